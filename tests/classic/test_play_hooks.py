"""Hooks while playing: steps, episodes, their file and its plots, curricula; they change nothing by themselves."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

import classic
from classic.callbacks import every_steps
from classic.config import EPISODE_COLUMNS
from classic.envs.environments import Environments
from classic.episodes import plot_episodes, read_episodes


class Graded(gymnasium.Wrapper):
    """A difficulty, which the last step's infos name beside the rewards so far."""

    difficulty, right = 0.0, 0.0

    def step(self, action):
        observation, reward, over, cut, _ = self.env.step(action)
        self.right += reward
        info = {"right": np.float32(self.right), "difficulty": self.difficulty} if over else {}
        self.right = 0.0 if over else self.right
        return observation, reward, over, cut, info


def graded():
    return Graded(gymnasium.make("tests/Match-v0"))


def test_hooks_see_every_step_and_episode_and_change_nothing(small):
    steps, episodes = [], []
    agent = classic.PPO("tests/Match-v0", small())
    agent.learn(300, on_step=lambda agent, step: steps.append(step), on_episode=lambda agent, row: episodes.append(row))
    assert sum(int(step.mask.sum()) for step in steps) == agent.counters["env_steps"]
    assert len(episodes) == agent.counters["episodes"]
    assert [row["return"] for row in episodes][-100:] == [episode.total_reward for episode in agent.recent]
    plain = classic.PPO("tests/Match-v0", small()).learn(300)
    assert (plain.network.policy[0].weight == agent.network.policy[0].weight).all()


@pytest.mark.parametrize("hook", ["on_step", "on_episode"])
def test_a_hook_that_returns_true_ends_training_with_its_rollout(hook, small):
    agent = classic.PPO("tests/Match-v0", small()).learn(10_000, **{hook: lambda *_: True})
    assert agent.counters["iteration"] == 1
    with pytest.raises(ValueError, match=r"must be a function of \(agent, (step|episode)\)"):
        agent.learn(64, **{hook: 3})


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
def test_each_episode_has_a_line_with_the_steps_so_far_and_the_infos_asked_for(mode, small, tmp_path):
    """Five steps per episode, copies in step: episodes end at steps 20, 40, ... of four copies."""
    args = small(autoreset_mode=mode, output_dir=str(tmp_path), episode_info=("right", "missing"), save_every=1)
    agent = classic.PPO(graded, args).learn(200)
    rows = read_episodes(tmp_path)
    assert len(rows) == agent.counters["episodes"] and {row["length"] for row in rows} == {5}
    assert [row["env_steps"] for row in rows] == [20 * (k // 4 + 1) for k in range(len(rows))]
    assert all(row["right"] == row["return"] for row in rows) and "missing" not in rows[0]
    assert [row["env"] for row in rows[:4]] == [0, 1, 2, 3] and rows[0]["iteration"] == 1
    assert 0 <= rows[0]["seconds"] <= rows[-1]["seconds"]
    # A resumed run repeats what came after its checkpoint, once.
    again = classic.PPO(graded, args)
    again.learn(200, resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert [{**row, "seconds": 0} for row in read_episodes(tmp_path)] == [{**row, "seconds": 0} for row in rows]


def test_plots_read_that_file(small, tmp_path, pictures):
    classic.PPO(graded, small(output_dir=str(tmp_path / "run"), episode_info=("right",))).learn(200)
    for x, y in (("env_steps", "return"), ("episodes", "right"), ("seconds", "length")):
        assert plot_episodes(tmp_path / "run", tmp_path / f"{x}.png", x=x, y=y).stat().st_size > 5_000
    with pytest.raises(ValueError, match=r"no episode in .*run has 'wrong'; they have env, env_steps, iteration"):
        plot_episodes([tmp_path / "run"], tmp_path / "no.png", y="wrong")
    with pytest.raises(FileNotFoundError, match=r"no episodes\.jsonl in .*: a run writes it while it trains"):
        plot_episodes(tmp_path, tmp_path / "no.png")


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_curriculum_sets_attributes_of_every_copy(vectorization, small):
    def harder(agent, metrics):
        agent.envs.set_attr("difficulty", agent.counters["iteration"] / 10)

    seen = []
    agent = classic.PPO(graded, small(vectorization=vectorization, num_envs=2, episode_info=("difficulty",)))
    agent.learn(96, callbacks=[harder], on_episode=lambda agent, row: seen.append(row["difficulty"]))
    last = agent.counters["iteration"]
    assert seen[0] == 0.0 and seen[-1] == (last - 1) / 10 and agent.envs.get_attr("difficulty") == [last / 10] * 2
    assert agent.envs.call("get_wrapper_attr", "difficulty") == [last / 10] * 2
    with pytest.raises(ValueError, match="has no attribute 'dificulty'"):
        agent.envs.set_attr("dificulty", 1.0)
    agent.close()


def test_an_environment_that_steps_its_own_copies_has_one_attribute():
    envs = Environments("CartPole-v1", 3)
    envs.set_attr("gravity", 1.5)
    assert envs.get_attr("gravity") == [1.5] and envs.envs.unwrapped.gravity == 1.5
    assert envs.call("close_extras") == [None]


def test_every_so_many_steps(small):
    calls = []
    classic.PPO("tests/Match-v0", small(autoreset_mode="same_step")).learn(
        640, callbacks=[every_steps(150, lambda agent, metrics: calls.append(agent.counters["env_steps"]))]
    )
    assert calls == [192, 320, 512, 640]  # the first multiples of 64 at or above 150, 300, 450 and 600
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        every_steps(0, lambda *_: None)


def test_training_wrappers_are_not_around_evaluations(small):
    args = small(training_wrappers=("ClipReward(max_reward=0.25)",), num_steps=10)
    agent = classic.PPO("tests/Chain-v0", args)  # 1 for each of eight steps
    assert agent.evaluate(4)["mean_return"] == 8.0  # also before training, when copies would be shared
    agent.learn(80)
    assert {episode.total_reward for episode in agent.recent} == {2.0} and agent.evaluate(4)["mean_return"] == 8.0
    with pytest.raises(ValueError, match=r"training_wrappers=.* is one environment, on which evaluations play, too"):
        classic.PPO(gymnasium.make("tests/Match-v0"), small(num_envs=1, training_wrappers=("ClipReward",)))


class Talkative(gymnasium.Wrapper):
    """Infos that are dicts, and what JSON does not know."""

    def step(self, action):
        observation, reward, over, cut, _ = self.env.step(action)
        info = {"more": {"a": 1, "b": np.float32(2), "deep": {"c": "x"}}, "thing": range(3)}
        return observation, reward, over, cut, info if over else {}


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
def test_infos_may_be_dicts_and_anything_else(mode, small, tmp_path):
    settings = {"autoreset_mode": mode, "output_dir": str(tmp_path), "wrappers": ("RecordEpisodeStatistics",)}
    args = small(episode_info=("more", "thing", "episode"), **settings)
    classic.PPO(lambda: Talkative(gymnasium.make("tests/Match-v0")), args).learn(200)
    for row in read_episodes(tmp_path):
        assert row["more"] == {"a": 1, "b": 2.0, "deep": {"c": "x"}} and row["thing"] == "range(0, 3)"
        assert row["episode"]["r"] == row["return"]


def test_an_info_cannot_replace_an_episodes_own_columns(small, tmp_path):
    with pytest.raises(ValueError, match=r"episode_info='length' is a column that episodes\.jsonl has"):
        small(episode_info=("right", "length"))
    classic.PPO(graded, small(output_dir=str(tmp_path))).learn(64)
    assert tuple(read_episodes(tmp_path)[0]) == EPISODE_COLUMNS


@pytest.mark.parametrize("hook", ["on_step", "on_episode"])
def test_a_run_that_a_hook_ended_stays_ended_when_it_resumes(hook, small, tmp_path):
    def run(**learn):
        agent = classic.PPO("tests/Match-v0", small(save_every=1, output_dir=str(tmp_path)))
        return agent.learn(640, **learn).counters["iteration"]

    hooks = {hook: lambda agent, _: agent.counters["iteration"] >= 2}
    assert run(**hooks) == 3 == run(**hooks, resume_from_checkpoint="auto")
    assert run(resume_from_checkpoint="auto") > 3  # without the hook nothing holds it
