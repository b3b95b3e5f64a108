"""Normalised values: a run that does not depend on the unit of the rewards.

What is true in control tasks: ``a * r`` for every reward r leaves the run unchanged. An offset does so where every
return moves by the same number: paid once per episode, with the last reward, under gamma 1, if all episodes end inside
the rollout; or paid at every step under gamma < 1, where no episode terminates, so that V moves by b / (1 - gamma). An
offset per step in a task that terminates is another task: it pays for long episodes, or for short ones.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import classic
from classic.advantages import estimate_advantages, first_value_scale
from rlhf_ppo.core import ValueScale
from rlhf_ppo.runtime.checkpoints.checkpoint import CheckpointError
from rlhf_ppo.runtime.checkpoints.checkpoint_commit import write_checkpoint

UNITS = [1e-3, 1e3]


class Signs(gymnasium.Env):
    """Reward 1 for naming the sign that is shown, for ever; the time limit cuts episodes."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def _show(self):
        self.sign = int(self.np_random.integers(2))
        return np.array([2.0 * self.sign - 1], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._show(), {}

    def step(self, action):
        reward = float(action == self.sign)
        return self._show(), reward, False, False, {}


gymnasium.register("tests/Signs-v0", entry_point=Signs, disable_env_checker=True, max_episode_steps=7)


class Priced(gymnasium.Wrapper):
    """Rewards in another unit: times a, plus b at every step or at each episode's last."""

    def __init__(self, env, a, b, last_only):
        super().__init__(env)
        self.a, self.b, self.last_only = a, b, last_only

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        paid = not self.last_only or terminated or truncated
        return observation, self.a * reward + self.b * paid, terminated, truncated, info


def priced(env_id, a=1.0, b=0.0, last_only=False):
    return partial(lambda: Priced(gymnasium.make(env_id), a, b, last_only))


def train(env, args, folder, steps=260):
    agent = classic.PPO(env, dataclasses.replace(args, output_dir=str(folder))).learn(steps)
    return agent, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(first, second, a, shift):
    """Compare two runs whose rewards differ by a factor a and whose values differ by ``shift`` as well."""
    (plain, ours), (other, theirs) = first, second
    assert plain.value_scale.count == other.value_scale.count > 1
    assert torch.equal(plain.last_update.rollout.actions, other.last_update.rollout.actions)
    for name, parameter in plain.network.named_parameters():
        torch.testing.assert_close(dict(other.network.named_parameters())[name], parameter, atol=2e-4, rtol=1e-3)
    for row, same in zip(ours, theirs, strict=True):
        assert same["policy/loss"] == pytest.approx(row["policy/loss"], abs=1e-4)
        assert same["optim/grad_norm"] == pytest.approx(row["optim/grad_norm"], rel=1e-2)
        assert same["value/explained_variance"] == pytest.approx(row["value/explained_variance"], abs=1e-3)
        # What is reported about values is in the reward's own unit.
        for name in ("value/mean", "value/return_mean"):
            assert same[name] == pytest.approx(a * row[name] + shift, rel=1e-4, abs=1e-4 * a)
        for name in ("value/return_std", "value/clip_range", "advantage/std"):
            assert same[name] == pytest.approx(a * row[name], rel=1e-3)
        assert same["value/loss"] == pytest.approx(a**2 * row["value/loss"], rel=1e-2)


TASKS = {
    "choices": ("tests/Match-v0", {}),
    "numbers": ("tests/Aim-v0", {}),
    "ends of both kinds": ("tests/Clock-v0", {"autoreset_mode": "same_step"}),
    "shared layers": ("tests/Match-v0", {"shared_network": True, "ent_coef": 0.01}),
    "memory": ("tests/Recall-v0", {"recurrent": "lstm", "recurrent_size": 8}),
    "recomputed": ("tests/Match-v0", {"recompute_advantages": True}),
    "no baseline": ("tests/Match-v0", {"objective": "reinforce", "num_epochs": 1}),
}


@pytest.mark.parametrize("a", UNITS)
@pytest.mark.parametrize("task", TASKS)
def test_the_unit_of_the_rewards_changes_nothing(task, a, small, tmp_path):
    env_id, settings = TASKS[task]
    args = small(clip_range_vf=0.3, gamma=0.9, **settings)
    runs = [train(priced(env_id, unit), args, tmp_path / str(unit)) for unit in (1.0, a)]
    assert_same_run(*runs, a, 0.0)


@pytest.mark.parametrize(("a", "b"), [(1.0, 3e7), (1e-3, -50.0), (1e3, -1e5)])
def test_an_offset_paid_once_an_episode_changes_nothing(a, b, small, tmp_path):
    """Match's episodes have five steps, so that a rollout of fifteen holds whole ones, and gamma 1 moves V by b."""
    args = small(num_steps=15, gamma=1.0, autoreset_mode="same_step", clip_range_vf=0.3)
    runs = [
        train(priced("tests/Match-v0", *unit, last_only=True), args, tmp_path / f"{unit}")
        for unit in ((1.0, 0.0), (a, b))
    ]
    assert_same_run(*runs, a, b)


@pytest.mark.parametrize(("a", "b"), [(1.0, 3e7), (1e-3, -50.0), (1e3, -1e5)])
def test_an_offset_at_every_step_changes_nothing_where_no_episode_terminates(a, b, small, tmp_path):
    args = small(gamma=0.9, clip_range_vf=0.3)
    runs = [train(priced("tests/Signs-v0", *unit), args, tmp_path / f"{unit}") for unit in ((1.0, 0.0), (a, b))]
    assert_same_run(*runs, a, b / (1 - 0.9))


def test_without_normalized_values_the_unit_shows(small, tmp_path):
    runs = [train(priced("tests/Match-v0", a), small(normalize_values=False), tmp_path / str(a)) for a in (1.0, 1e3)]
    (plain, rows), (other, _) = runs
    assert plain.value_scale == other.value_scale == ValueScale() and "value/return_std" not in rows[0]
    assert not torch.allclose(plain.optimizer.weights.vector, other.optimizer.weights.vector, atol=0.01)


def test_the_first_rollout_gives_the_unit_and_the_mean_stands_in_for_what_it_cuts_off(small):
    """Signs, gamma 0.5, rewards 4 and 0: the values at the cuts are the mean of what they lead to."""
    agent = classic.PPO("tests/Signs-v0", small(num_envs=1, num_steps=2, num_minibatches=1, gamma=0.5)).learn(2)
    rollout = agent.last_update.rollout
    four = dataclasses.replace(rollout, rewards=torch.tensor([[4.0, 0.0]]))
    # To go: 4 + m/4 and m/2, whose mean is m: 2 + 3m/8 = m, so m = 3.2 and they are 4.8 and 1.6.
    scale = first_value_scale(four, 0.5)
    assert (scale.mean, scale.std, scale.count) == (pytest.approx(3.2), pytest.approx(1.6), 1)
    # Without a discount nothing bounds that mean: 4 and 0.
    assert first_value_scale(four, 1.0) == ValueScale(2.0, 2.0, 1)
    # An end is no cut: 4 and 0 again.
    over = dataclasses.replace(four, terminated=torch.tensor([[False, True]]))
    assert first_value_scale(over, 0.5) == ValueScale(2.0, 2.0, 1)
    # Rewards that are always the same: V is known, and no unit is.
    same = dataclasses.replace(rollout, rewards=torch.full((1, 2), 0.1))
    assert first_value_scale(same, 0.5) == ValueScale(pytest.approx(0.2), 1.0, 0)


def test_a_fresh_critics_values_are_returns(small):
    """Its random outputs, of about 1, count in the unit of the returns; CartPole's lie around 20, times 1e4."""
    agent = classic.PPO(priced("CartPole-v1", 1e4), small(num_steps=64, normalize_values=True)).learn(1)
    values, scale = agent.last_update.estimate.values, agent.value_scale
    assert scale.mean > 5e4 and abs(values - scale.mean).mean() < 2 * scale.std


def test_the_critic_stays_fresh_until_returns_differ(small, tmp_path):
    agent = classic.PPO("tests/Chain-v0", small(gamma=0.9)).learn(130)  # reward 1 for ever
    assert agent.value_scale is None and agent.counters["iteration"] > 1
    assert agent.last_metrics["value/return_std"] == 1
    assert agent.last_metrics["value/mean"] == pytest.approx(10, abs=2)
    agent.save(tmp_path)
    assert classic.PPO.load(tmp_path).value_scale is None
    agent.explain()


@pytest.mark.parametrize("settings", [{}, {"shared_network": True}, {"recurrent": "gru"}, {"activation": "relu"}])
def test_values_keep_their_meaning_while_the_unit_moves(settings, small):
    agent = classic.PPO("tests/Clock-v0", small(**settings)).learn(64)
    rollout, vector = agent.last_update.rollout, agent.optimizer.weights.vector
    before = estimate_advantages(agent.network, rollout, agent.config, agent.value_scale).values
    was, policy = vector.detach().clone(), agent.network.policy[-1].weight.detach().clone()
    agent.state.change_value_scale(ValueScale(-40.0, 0.25, 7))
    after = estimate_advantages(agent.network, rollout, agent.config, agent.value_scale).values
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-5)
    # The optimizer's vector, from which the shortcuts compute, has changed, and the critic's last layer alone.
    head = agent.network.critic[-1]
    assert int((vector != was).sum()) <= head.weight.numel() + 1 and not torch.equal(vector, was)
    assert torch.equal(agent.optimizer.weights.of(vector, f"critic.{len(agent.network.critic) - 1}.bias"), head.bias)
    assert torch.equal(agent.network.policy[-1].weight, policy)
    assert agent.learn(1).last_metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-5


@pytest.mark.parametrize("how", ["frozen", "another layer"])
def test_a_last_layer_that_cannot_be_rescaled_keeps_its_unit(how, small):
    agent = classic.PPO("tests/Clock-v0", small()).learn(64)
    scale = agent.value_scale
    if how == "frozen":
        agent.network.critic[-1].requires_grad_(False)
        weight = agent.network.critic[-1].weight.detach().clone()
    else:
        agent.network.critic.append(torch.nn.Identity())
    agent.learn(64)
    agent.args = dataclasses.replace(agent.args, normalize_values=False)
    agent.learn(64)
    assert agent.value_scale == scale
    if how == "frozen":
        assert torch.equal(agent.network.critic[-1].weight, weight)


def test_a_saved_agent_keeps_its_unit_and_one_of_an_earlier_version_has_the_rewards_own(small, tmp_path):
    agent = classic.PPO("tests/Far-v0", small()).learn(130)
    scale = agent.value_scale
    assert scale.count > 1 and scale.std > 1e3
    assert copy.deepcopy(agent).value_scale == scale
    agent.save(tmp_path)
    loaded = classic.PPO.load(tmp_path)
    assert loaded.value_scale == scale
    assert loaded.learn(1).value_scale.count == scale.count + 1
    raw = classic.PPO.load(tmp_path, normalize_values=False)
    assert raw.value_scale == ValueScale()
    rollout = agent.last_update.rollout
    values = [estimate_advantages(a.network, rollout, a.config, a.value_scale).values for a in (agent, raw)]
    torch.testing.assert_close(values[1].double(), values[0], rtol=1e-4, atol=1.0)

    content = json.loads((tmp_path / "agent.json").read_text())
    del content["value_scale"], content["args"]["normalize_values"]
    (tmp_path / "agent.json").write_text(json.dumps(content))
    earlier = classic.PPO.load(tmp_path)
    assert earlier.args.normalize_values is False and earlier.learn(64).value_scale == ValueScale()
    turned_on = classic.PPO.load(tmp_path, normalize_values=True)
    assert turned_on.value_scale == ValueScale() and turned_on.learn(1).value_scale.count == 1


def write_as_earlier_versions(folder, iteration, *, state, settings, **rest):
    """They knew neither the setting nor the unit."""
    state, settings = ({n: x for n, x in d.items() if "value" not in n} for d in (state, settings))
    return write_checkpoint(folder, iteration, state=state, settings=settings, **rest)


def test_a_checkpoint_of_an_earlier_version_resumes_as_before(small, tmp_path, monkeypatch):
    args = small(output_dir=str(tmp_path / "a"), save_every=1, normalize_values=False)
    whole = classic.PPO("tests/Match-v0", args).learn(130)
    monkeypatch.setattr("classic.checkpoint.write_checkpoint", write_as_earlier_versions)
    args = dataclasses.replace(args, output_dir=str(tmp_path / "b"))
    classic.PPO("tests/Match-v0", args).learn(130)
    checkpoint = tmp_path / "b" / "checkpoint-1"
    args = dataclasses.replace(args, output_dir=str(tmp_path / "c"))
    resumed = classic.PPO("tests/Match-v0", args).learn(130, resume_from_checkpoint=checkpoint)
    assert resumed.value_scale == ValueScale()
    assert torch.equal(resumed.optimizer.weights.vector, whole.optimizer.weights.vector)
    args = dataclasses.replace(args, normalize_values=True, output_dir=str(tmp_path / "d"))
    with pytest.raises(CheckpointError, match="normalize_values: false -> true"):
        classic.PPO("tests/Match-v0", args).learn(130, resume_from_checkpoint=checkpoint)


def test_a_resumed_run_keeps_the_unit(small, tmp_path):
    args = small(output_dir=str(tmp_path / "a"), save_every=1)
    whole = classic.PPO("tests/Clock-v0", args).learn(130)
    args = dataclasses.replace(args, output_dir=str(tmp_path / "b"))
    with pytest.warns(UserWarning, match="new episodes begin"):  # Clock counts its own
        resumed = classic.PPO("tests/Clock-v0", args).learn(130, resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    assert resumed.value_scale.count == whole.value_scale.count == 3


def test_settings_changed_before_training_equal_those_an_agent_was_made_with(small):
    agent = classic.PPO("tests/Match-v0", small(normalize_values=False))
    agent.args = dataclasses.replace(agent.args, normalize_values=True)
    made = classic.PPO("tests/Match-v0", small(normalize_values=True))
    assert torch.equal(agent.learn(130).optimizer.weights.vector, made.learn(130).optimizer.weights.vector)
    agent.args = dataclasses.replace(agent.args, normalize_values=False)
    assert agent.value_scale == ValueScale() and agent.learn(64).value_scale == ValueScale()


def test_rewards_and_values_may_both_be_normalized(small):
    agent = classic.PPO("tests/Far-v0", small(normalize_rewards=True)).learn(130)
    assert agent.normalizer.returns.variance > 1e6 and agent.value_scale.std < 10
