"""Evaluation: it ends, it stops when asked to, and it limits its copies."""

from __future__ import annotations

import os
import signal
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

import classic
from classic import evaluation, video
from classic.callbacks import evaluate_every
from classic.cli import main
from classic.video import record_video
from rlhf_ppo.runtime.machine.signals import Interrupted


class Endless(gymnasium.Env):
    """Reward 1 for ever; or an end after as many steps as told. Knows how many copies there are."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    running = made = most = steps = 0
    signal_at = None

    def __init__(self, end=None, render_mode="rgb_array"):
        self.end, self.render_mode = end, render_mode
        Endless.running += 1
        Endless.made += 1
        Endless.most = max(Endless.most, Endless.running)

    def close(self):
        Endless.running -= 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        self.t += 1
        Endless.steps += 1
        if Endless.steps == Endless.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return np.zeros(1, dtype=np.float32), 1.0, self.t == self.end, False, {}

    def render(self):
        return np.full((4, 4, 3), self.t % 256, dtype=np.uint8)


@pytest.fixture(autouse=True)
def counted():
    for name in ("running", "made", "most", "steps"):
        setattr(Endless, name, 0)
    Endless.signal_at = None


gymnasium.register("tests/Endless-v0", Endless)
gymnasium.register("tests/Long-v0", Endless, max_episode_steps=90)


@pytest.mark.parametrize("episodes", [1, 3, 9])
def test_an_endless_episode_is_cut_and_the_missing_limit_named(episodes, small, tmp_path):
    agent = classic.PPO(Endless, small(eval_max_steps=50)).learn(64)
    words = (
        rf"{episodes} of {episodes} episodes were cut after 50 steps \(eval_max_steps\).*'Endless' has no time limit"
    )
    with pytest.warns(UserWarning, match=words):
        assert agent.evaluate(episodes) == {"mean_return": 50, "std_return": 0, "mean_length": 50}
    with pytest.warns(UserWarning, match="1 of 1 episodes were cut after 50 steps"):
        record_video(agent, tmp_path / "a.png")


def test_episodes_that_end_are_not_cut(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert classic.PPO(lambda: Endless(50), small(eval_max_steps=50)).evaluate(9)["mean_return"] == 50


@pytest.mark.parametrize("autoreset_mode", ["next_step", "same_step"])
def test_copies_play_their_shares_whether_cut_or_not(autoreset_mode, small):
    """Copies end after 3, 30, ... steps: of nine episodes the endless copies' are cut at 30, whatever the others do."""
    ends = iter([3, None, 6, None] * 2)
    agent = classic.PPO(lambda: Endless(next(ends)), small(eval_max_steps=30, autoreset_mode=autoreset_mode))
    with pytest.warns(UserWarning, match="5 of 9 episodes were cut"):
        result = agent.evaluate(9)
    # Shares of four copies: 2, 2, 2, 3.
    assert result["mean_return"] == pytest.approx((2 * 3 + 2 * 30 + 2 * 6 + 3 * 30) / 9)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_the_environments_own_limit_may_be_longer(vectorization, small, monkeypatch):
    monkeypatch.setattr("classic.evaluation.MAX_STEPS", 20)
    agent = classic.PPO("tests/Long-v0", small(vectorization=vectorization))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agent.evaluate(2)["mean_return"] == 90
    agent.close()
    cart = classic.PPO("CartPole-v1", small())
    assert evaluation.max_episode_steps(cart.run) == 500
    monkeypatch.undo()
    assert evaluation.max_episode_steps(cart.run) == 10_000
    with pytest.warns(UserWarning, match="'CartPole-v1' has its own at 500 steps"):
        assert classic.PPO("CartPole-v1", small(eval_max_steps=7)).evaluate(3)["mean_length"] == 7


def test_frames_of_a_long_video_are_thinned(small, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAMES", 8)
    agent = classic.PPO(lambda: Endless(40), small())
    from PIL import Image

    with (
        pytest.warns(UserWarning, match="shows every 8th step"),
        Image.open(record_video(agent, tmp_path / "a.gif")) as gif,
    ):
        assert gif.n_frames == 6  # of 41: 0, 8, 16, 24, 32, 40
        gif.seek(5)
        assert gif.convert("RGB").getpixel((0, 0))[0] == 40


def test_evaluations_keep_a_few_copies(small):
    agent = classic.PPO(lambda: Endless(3), small(num_envs=2, num_steps=64))
    agent.evaluate(20)  # before training, on its copies
    assert Endless.made == 2
    agent.learn(640, callbacks=[evaluate_every(1)])
    assert Endless.made == Endless.most == 4
    agent.close()
    assert Endless.running == 0
    more = classic.PPO(lambda: Endless(3), small(num_envs=2, eval_envs=5)).learn(16)
    more.evaluate(20)
    assert Endless.running == 7
    with pytest.raises(ValueError, match="eval_envs must be 1 or more, got 0"):
        classic.PPOArgs(eval_envs=0)


def test_a_loaded_agent_is_evaluated_on_num_envs_copies_with_the_same_result(small, tmp_path):
    agent = classic.PPO("tests/Long-v0", small(num_envs=2)).learn(64)
    expected = agent.evaluate(7)
    agent.save(tmp_path)
    agent.close()
    made = Endless.made
    loaded = classic.PPO.load(tmp_path)
    assert loaded.evaluate(7) == expected == loaded.evaluate(7) and Endless.made == made + 2


def test_copies_of_a_crashed_evaluation_are_not_reused(small):
    agent = classic.PPO(lambda: Endless(3), small(num_envs=2)).learn(16)
    step, Endless.step = Endless.step, lambda self, action: 1 / 0
    try:
        with pytest.raises(classic.BrokenEnvironmentError):
            agent.evaluate(2)
    finally:
        Endless.step = step
    assert Endless.running == 2 and agent.evaluate(2)["mean_return"] == 3


@pytest.mark.parametrize("single", [False, True])
def test_the_first_signal_stops_an_evaluation_and_the_run_resumes_exactly(single, small, tmp_path):
    def run(folder, **learn):
        args = small(output_dir=str(folder), num_envs=1 if single else 2, num_minibatches=1, eval_max_steps=50)
        agent = classic.PPO(Endless(7) if single else (lambda: Endless(7)), args)
        return agent.learn(160, callbacks=[evaluate_every(2, episodes=4)], **learn)

    whole = run(tmp_path / "whole")
    Endless.steps, Endless.signal_at = 0, 2 * 16 * (1 if single else 2) + 5  # five steps into the first evaluation
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped")
    assert Endless.steps <= Endless.signal_at + 1
    assert (tmp_path / "stopped" / "checkpoint-2").is_dir()
    Endless.signal_at = None
    again = run(tmp_path / "stopped", resume_from_checkpoint="auto")
    assert all(x.equal(y) for x, y in zip(whole.network.parameters(), again.network.parameters(), strict=True))
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_the_evaluation_at_the_end_of_the_command_stops_at_the_first_signal(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Endless.signal_at = 64 + 100
    words = "train tests/Endless-v0 --num-envs 2 --num-steps 32 --num-minibatches 1 --total-timesteps 64 --quiet"
    assert main(words.split()) == 143
    assert Endless.steps <= Endless.signal_at + 1 and "stopped by SIGTERM" in capsys.readouterr().err


def test_trainings_environment_and_the_same_id_without_its_arguments_have_copies_of_their_own(small):
    settings = {"env_kwargs": {"g": 0.0}, "eval_envs": 1}
    agent = classic.PPO("Pendulum-v1", small(**settings)).learn(64)
    own, plain = agent.evaluate(1), agent.evaluate(1, env="Pendulum-v1")
    other = classic.PPO("Pendulum-v1", small(**settings)).learn(64)
    assert other.evaluate(1, env="Pendulum-v1") == plain != own == other.evaluate(1)


def test_copies_of_functions_do_not_pile_up(small):
    agent = classic.PPO(lambda: Endless(3), small(num_envs=2))
    for _ in range(2 * evaluation.KEPT):
        agent.evaluate(1, env=lambda: Endless(3))
    assert Endless.running == 2 + evaluation.KEPT


def test_one_environment_given_to_evaluate_is_kept_open(small):
    agent, own = classic.PPO(lambda: Endless(3), small(num_envs=2)), Endless(3)
    for _ in range(2):
        agent.evaluate(4, env=own)
    assert Endless.running == 3
