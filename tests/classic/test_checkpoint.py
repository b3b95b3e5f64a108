"""Exact resume: a run that stops anywhere and resumes equals the run that never stopped, byte for byte."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import classic
from classic.callbacks import evaluate_every
from classic.cli import main
from classic.state import begin_episodes
from rlhf_ppo.runtime.checkpoints.checkpoint import CheckpointError, list_checkpoints
from rlhf_ppo.runtime.machine.signals import Interrupted

RUNS = {
    "own vector version": ("CartPole-v1", {}),
    "copies, next step": ("tests/Match-v0", {"autoreset_mode": "next_step"}),
    # An episode is five steps and a reset, so the first checkpoint, after 11 steps, is followed by the second reset.
    "a reset to come": ("tests/Match-v0", {"autoreset_mode": "next_step", "num_steps": 11, "save_every": 1}),
    "copies, same step": ("tests/Match-v0", {"autoreset_mode": "same_step"}),
    "numbers": ("Pendulum-v1", {"normalize_rewards": True, "normalize_observations": True}),
    "memory": ("tests/Recall-v0", {"recurrent": "lstm", "recurrent_size": 5}),
    "masks": ("tests/Allowed_info-v0", {}),
    "beta": ("tests/Match-v0", {"objective": "penalty", "target_kl": 0.01}),
    "wrapped": ("CartPoleNoVel-v1", {"wrappers": ("TimeAwareObservation",), "clip_range_schedule": "linear"}),
}


class KilledError(Exception):
    """Stands for a process that ends."""


def kill_after(rollouts):
    def callback(agent, metrics):
        if agent.counters["iteration"] == rollouts:
            raise KilledError

    return callback


def settings(small, folder, extra, **more):
    # An episode of Pendulum is longer than this whole run, so it is resumed in the middle.
    return small(output_dir=str(folder), **{"save_every": 2, "num_steps": 13, **extra, **more})


def files(folder):
    return (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "killed_after"), [*((name, 3) for name in RUNS), ("copies, next step", 4), ("a reset to come", 1)]
)
def test_a_killed_run_resumes_bit_for_bit(name, killed_after, small, tmp_path):
    """Checkpoints at 2 and 4: killed after 3, one update is repeated; after 4, only its evaluation."""
    env_id, extra = RUNS[name]
    whole = classic.PPO(env_id, settings(small, tmp_path / "whole", extra)).learn(
        400, callbacks=[evaluate_every(2, episodes=2)]
    )
    args = settings(small, tmp_path / "parts", extra)
    with pytest.raises(KilledError):
        classic.PPO(env_id, args).learn(400, callbacks=[evaluate_every(2, episodes=2), kill_after(killed_after)])
    torch.rand(5)
    resumed = classic.PPO(env_id, args).learn(
        400, callbacks=[evaluate_every(2, episodes=2)], resume_from_checkpoint="auto"
    )
    assert whole.counters["iteration"] > 5
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    for ours, theirs in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    state, other = whole.optimizer.state(), resumed.optimizer.state()
    assert set(state) == set(other) and all(torch.equal(state[key], other[key]) for key in state)
    assert all(torch.equal(x, resumed.normalizer.state()[key]) for key, x in whole.normalizer.state().items())
    assert whole.best_return == resumed.best_return and whole.recent == resumed.recent
    newest = [list_checkpoints(tmp_path / part)[-1] / "model.safetensors" for part in ("whole", "parts")]
    assert newest[0].read_bytes() == newest[1].read_bytes()


@pytest.mark.parametrize(
    ("env_id", "extra"),
    [("tests/Clock-v0", {}), ("tests/MatrixObservation-v0", {}), ("CartPole-v1", {"vectorization": "async"})],
)
def test_new_episodes_begin_with_a_warning_if_an_environment_cannot_be_restored(env_id, extra, small, tmp_path):
    """Clock counts its episodes, Spaces draws from elsewhere than its generator, processes keep their state."""
    args = settings(small, tmp_path, {"num_envs": 2, **extra})
    with pytest.raises(KilledError):
        classic.PPO(env_id, args).learn(200, callbacks=[kill_after(2)])
    runs = []
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"cannot be restored to where .*checkpoint-2 left it, so new"):
            agent = classic.PPO(env_id, args)
            agent.learn(200, resume_from_checkpoint=tmp_path / "checkpoint-2")
        runs.append((tmp_path / "metrics.jsonl").read_bytes())
        agent.envs.close()
    # Not the run that never stopped, but one that can be repeated.
    assert runs[0] == runs[1] and agent.counters["env_steps"] >= 200


def test_auto_starts_afresh_only_where_there_is_no_checkpoint(small, tmp_path):
    agent = classic.PPO("tests/Match-v0", settings(small, tmp_path, {})).learn(60, resume_from_checkpoint="auto")
    assert agent.counters["iteration"] == 2
    for model in tmp_path.glob("checkpoint-*/model.safetensors"):
        model.write_bytes(b"bad")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is good"):
        classic.PPO("tests/Match-v0", settings(small, tmp_path, {})).learn(60, resume_from_checkpoint="auto")
    with pytest.raises(FileNotFoundError, match=r"checkpoint-9: the folder does not exist; .*: checkpoint-2"):
        classic.PPO("tests/Match-v0", small()).learn(60, resume_from_checkpoint=tmp_path / "checkpoint-9")
    with pytest.raises(ValueError, match="looks in output_dir, which is None"):
        classic.PPO("tests/Match-v0", small()).learn(60, resume_from_checkpoint="auto")


def test_fault_26_another_run_is_not_resumed(small, tmp_path):
    classic.PPO("tests/Match-v0", settings(small, tmp_path, {})).learn(120)
    where = {"resume_from_checkpoint": tmp_path / "checkpoint-2"}
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.003 -> 0\.1\n.*resume_override=True"):
        classic.PPO("tests/Match-v0", settings(small, tmp_path, {}, learning_rate=0.1)).learn(120, **where)
    with pytest.raises(CheckpointError, match="total: 120 -> 500"):
        classic.PPO("tests/Match-v0", settings(small, tmp_path, {})).learn(500, **where)
    with pytest.raises(CheckpointError, match="env_id"):
        classic.PPO("tests/Far-v0", settings(small, tmp_path, {})).learn(120, **where)
    agent = classic.PPO("tests/Match-v0", settings(small, tmp_path, {}, save_every=1)).learn(120, **where)
    with pytest.raises(ValueError, match="for a fresh agent, but this one has learned already"):
        agent.learn(120, **where)


def test_fault_26_an_override_resumes_with_the_new_settings_and_steps(small, tmp_path):
    classic.PPO("tests/Match-v0", settings(small, tmp_path, {}, save_every=1)).learn(200)
    left, rows = [p.name for p in list_checkpoints(tmp_path)], files(tmp_path).splitlines()
    other = classic.PPO(
        "tests/Match-v0", settings(small, tmp_path, {}, learning_rate=0.1, clip_range=0.3, save_every=1)
    )
    where = {"resume_from_checkpoint": tmp_path / "checkpoint-2", "resume_override": True}
    with pytest.warns(
        UserWarning, match=r"clip_range: 0\.2 -> 0\.3\n  learning_rate: 0\.003 -> 0\.1\n  total: 200 -> 150"
    ):
        other.learn(150, **where)
    assert other.config.clip_range == 0.3 and 150 <= other.counters["env_steps"] < 200
    now = files(tmp_path).splitlines()
    assert now[:2] == rows[:2] and now[2] != rows[2]
    # What the old settings made of the run after that checkpoint is none of its own any more.
    assert [p.name for p in list_checkpoints(tmp_path)] == left[: len(now)] and len(now) < len(rows)
    assert [p.name for p in list_checkpoints(tmp_path / "previous-1")] == left[2:]


def test_fault_26_an_override_cannot_make_another_network_or_other_statistics(small, tmp_path):
    classic.PPO("tests/Match-v0", settings(small, tmp_path, {})).learn(120)
    where = {"resume_from_checkpoint": "auto", "resume_override": True}
    for change, message in (
        ({"hidden_sizes": (4,)}, "belongs to another network"),
        ({"normalize_observations": True}, r"has no statistics observations\.count"),
    ):
        agent = classic.PPO("tests/Match-v0", settings(small, tmp_path, {}, **change))
        with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=message):
            agent.learn(120, **where)
        assert agent.counters["iteration"] == 0


def test_an_override_with_other_copies_begins_new_episodes(small, tmp_path):
    scaled = {"normalize_rewards": True, "num_minibatches": 1}
    classic.PPO("tests/Match-v0", settings(small, tmp_path, scaled)).learn(120)
    agent = classic.PPO("tests/Match-v0", settings(small, tmp_path, scaled, num_envs=3))
    with pytest.warns(UserWarning) as said:
        agent.learn(300, resume_from_checkpoint=tmp_path, resume_override=True)
    assert "num_envs: 4 -> 3" in str(said[0].message) and "new episodes begin" in str(said[1].message)
    assert agent.counters["env_steps"] >= 300


def test_a_run_resumes_in_another_folder_with_its_history(small, tmp_path):
    classic.PPO("tests/Match-v0", settings(small, tmp_path / "one", {})).learn(200)
    there = settings(small, tmp_path / "two", {})
    classic.PPO("tests/Match-v0", there).learn(200, resume_from_checkpoint=tmp_path / "one" / "checkpoint-2")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_only_the_newest_checkpoints_are_kept(small, tmp_path):
    classic.PPO("tests/Match-v0", settings(small, tmp_path, {}, save_every=1, save_total_limit=2)).learn(200)
    assert len(list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_after_the_current_update(number, code, small, tmp_path):
    args = settings(small, tmp_path / "parts", {}, save_every=0)
    agent = classic.PPO("tests/Match-v0", args)
    step = agent.optimizer.step

    def interrupted():
        if agent.counters["iteration"] == 2:
            os.kill(os.getpid(), number)
            agent.optimizer.step = step
        return step()

    agent.optimizer.step = interrupted
    with pytest.raises(Interrupted) as caught:
        agent.learn(300)
    assert caught.value.exit_code == code and agent.counters["iteration"] == 3
    classic.PPO("tests/Match-v0", args).learn(300, resume_from_checkpoint="auto")
    classic.PPO("tests/Match-v0", settings(small, tmp_path / "whole", {}, save_every=0)).learn(300)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_two_runs_do_not_write_into_one_folder(small, tmp_path):
    def second(agent, metrics):
        classic.PPO("tests/Match-v0", settings(small, tmp_path, {})).learn(10)

    with pytest.raises(ValueError, match="is in use by another run"):
        classic.PPO("tests/Match-v0", settings(small, tmp_path, {})).learn(100, callbacks=[second])


def test_a_killed_process_resumes_from_the_command_line(tmp_path, capsys):
    """SIGKILL once a checkpoint is there; the same command with --resume auto finishes the run, byte for byte."""
    words = "train CartPole-v1 --quiet --total-timesteps 3000 --save-every 1 --eval-episodes 2".split()

    def run(folder: str, *more: str) -> int:
        return main([*words, "--output-dir", str(tmp_path / folder), *more])

    command = [sys.executable, "-m", "classic.cli", *words, "--output-dir", str(tmp_path / "parts")]
    environment = {**os.environ, "PYTHONPATH": str(Path(classic.__file__).parents[1])}
    victim = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not list_checkpoints(tmp_path / "parts") and victim.poll() is None:
        time.sleep(0.005)
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    assert run("parts", "--resume", "auto", "--learning-rate", "0.1") == 2
    said = capsys.readouterr().err
    assert "learning_rate: 0.004 -> 0.1" in said and "--resume-override" in said
    assert run("parts", "--resume", "auto") == run("whole") == 0
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    saved = [(tmp_path / part / "optimizer.safetensors").read_bytes() for part in ("parts", "whole")]
    assert saved[0] == saved[1]
    with pytest.warns(UserWarning, match="Continuing with the new ones"):
        assert run("parts", "--resume", "auto", "--learning-rate", "0.1", "--resume-override") == 0


class Lucky(gymnasium.RewardWrapper):
    """Its reward is drawn from elsewhere than ``np_random``; the observation does not show it."""

    generator = np.random.default_rng(0)

    def reward(self, reward):
        return self.generator.random()


def lucky():
    return Lucky(gymnasium.make("tests/Chain-v0"))


@pytest.mark.parametrize(("env", "more"), [(lucky, {}), ("tests/Match-v0", {"wrappers": ("NormalizeReward",)})])
def test_new_episodes_begin_with_a_warning_if_replayed_rewards_differ(env, more, small, tmp_path):
    args = settings(small, tmp_path, {}, num_steps=7, **more)
    classic.PPO(env, args).learn(60)
    with pytest.warns(UserWarning, match="new episodes begin"):
        classic.PPO(env, args).learn(60, resume_from_checkpoint=list_checkpoints(tmp_path)[0])


def test_a_checkpoint_is_not_taken_for_a_saved_agent(small, tmp_path):
    classic.PPO("tests/Match-v0", settings(small, tmp_path, {})).learn(120)
    with pytest.raises(FileNotFoundError, match="checkpoint-2 is a checkpoint, which --resume continues from"):
        classic.PPO.load(tmp_path / "checkpoint-2")


class OldGenerator(gymnasium.Wrapper):
    """Keeps numpy's older kind of generator."""

    def reset(self, *, seed=None, options=None):
        began = super().reset(seed=seed)
        self.unwrapped.np_random = np.random.RandomState(seed)
        return began


def test_an_environment_with_another_generator_trains(small, tmp_path):
    agent = classic.PPO(lambda: OldGenerator(gymnasium.make("tests/Chain-v0")), settings(small, tmp_path, {})).learn(
        200
    )
    assert agent.counters["episodes"] > 10


def recorded(agent):
    return [len(copy.actions) for copy in agent.envs.envs.envs]


def test_episodes_are_recorded_only_if_checkpoints_can_be_written(small, tmp_path):
    """Endless's episodes have no end: without a folder they would be recorded for ever."""
    args = small(num_envs=2, num_steps=50)
    agent = classic.PPO(Endless, args).learn(200)
    assert recorded(agent) == [0, 0]
    agent.args = dataclasses.replace(agent.args, output_dir=str(tmp_path), save_every=1)
    assert agent.learn(100).envs.state()[1] is None  # these episodes began before
    begin_episodes(agent.run, agent.state)
    assert recorded(agent.learn(100)) == [50, 50] and agent.envs.state()[1] is not None
    agent.args = dataclasses.replace(agent.args, output_dir=None, save_every=0)
    assert recorded(agent.learn(100)) == [0, 0]


def test_an_endless_episode_is_no_longer_recorded_and_a_resumed_run_begins_new_ones(small, tmp_path, monkeypatch):
    monkeypatch.setattr("classic.envs.wrappers.MAX_ACTIONS", 120)
    args = small(num_envs=2, num_steps=50, output_dir=str(tmp_path), save_every=1)
    agent = classic.PPO(Endless, args)
    with pytest.warns(UserWarning, match=r"gone on for more than 120 steps: they are no longer recorded"):
        agent.learn(400, callbacks=[lambda agent, metrics: agent.counters["iteration"] == 3])
    assert recorded(agent) == [0, 0]
    with pytest.warns(UserWarning, match="so new episodes begin"):
        resumed = classic.PPO(Endless, args).learn(400, resume_from_checkpoint="auto")
    assert resumed.counters["iteration"] == 4


class Endless(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}
