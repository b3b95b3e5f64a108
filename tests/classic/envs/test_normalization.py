"""Normalisation: statistics of unmasked steps, the same in both autoreset modes, frozen outside training."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

import classic
from classic.envs.errors import BrokenEnvironmentError
from classic.envs.normalization import Normalizer, RunningStatistics


def test_statistics_of_batches_equal_those_of_everything_at_once():
    rows = np.random.default_rng(0).normal(1e4, 3.0, (103, 2))
    statistics = RunningStatistics((2,))
    for part in np.split(rows, [1, 2, 40, 40]):
        statistics.update(part)
    np.testing.assert_allclose(statistics.mean, rows.mean(axis=0))
    np.testing.assert_allclose(statistics.variance, rows.var(axis=0))
    assert statistics.count == 103


def test_rewards_are_divided_by_the_spread_of_discounted_returns_which_begin_again_after_an_end():
    """Returns by hand, gamma 1/2: 1, 2.5 | cut, 4, then a reset step, 1: sums 1, 2.5, 4, -, 1."""
    normalizer = Normalizer(None, 1, 0.5)
    scaled = []
    for reward, done, mask in ((1, False, True), (2, True, True), (4, True, True), (0, False, False), (1, False, True)):
        flags = torch.tensor([done]), torch.tensor([mask])
        scaled.append(normalizer.scale_rewards(torch.tensor([float(reward)]), *flags).item())
    assert normalizer.returns.mean == pytest.approx(np.mean([1, 2.5, 4, 1]))
    assert normalizer.returns.variance == pytest.approx(np.var([1, 2.5, 4, 1]))
    assert scaled[2] == pytest.approx(4 / np.std([1, 2.5, 4])) and scaled[3] == 0


def test_only_unmasked_rows_count_and_frozen_statistics_stay():
    normalizer = Normalizer((1,), None, 0.9)
    seen = torch.tensor([[1.0], [3.0], [100.0]])
    scaled = normalizer.observe(seen, torch.tensor([True, True, False]))
    assert scaled[:, 0].tolist() == pytest.approx([-1, 1, 10])  # mean 2, deviation 1, kept within 10
    before = normalizer.state()
    assert torch.equal(normalizer.normalize(seen), scaled)
    assert all(torch.equal(x, normalizer.state()[name]) for name, x in before.items())


@pytest.mark.parametrize("setting", ["normalize_observations", "normalize_rewards"])
def test_both_autoreset_modes_give_the_same_statistics_on_the_same_trajectory(setting, small):
    """One copy of Clock: 12 decisions are 14 steps with two resets, or 12 without."""
    states = []
    for mode, steps in (("next_step", 14), ("same_step", 12)):
        args = small(num_envs=1, num_steps=steps, num_minibatches=1, autoreset_mode=mode, **{setting: True})
        states.append(classic.PPO("tests/Clock-v0", args).learn(1).normalizer.state())
    assert set(states[0]) == set(states[1])
    for name, x in states[0].items():
        torch.testing.assert_close(x, states[1][name])


def test_normalised_runs_record_what_the_policy_saw(small, tmp_path):
    """The first minibatch's ratio is 1 although the statistics have moved on; episode returns are not scaled."""
    args = small(normalize_observations=True, normalize_rewards=True, output_dir=str(tmp_path))
    agent = classic.PPO("tests/Clock-v0", args).learn(300)
    rows = agent.run.folder.read()
    assert max(row["policy/first_minibatch_max_abs_log_ratio"] for row in rows) < 1e-5
    assert rows[0]["episode/return_mean"] == pytest.approx(np.mean([5, 9, 13]))


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
def test_evaluation_and_prediction_use_the_statistics_and_leave_them(mode, small):
    args = small(normalize_observations=True, normalize_rewards=True, autoreset_mode=mode)
    agent = classic.PPO("tests/Clock-v0", args).learn(100)
    before = agent.normalizer.state()
    agent.evaluate(episodes=3)
    seen, act = [], agent.network.act
    agent.network.act = lambda x, *a, **k: (seen.append(x), act(x, *a, **k))[1]
    agent.predict([0.5, 0.2, 1.0])
    assert torch.equal(seen[0], agent.normalizer.normalize(torch.tensor([[0.5, 0.2, 1.0]])))
    assert all(torch.equal(x, agent.normalizer.state()[name]) for name, x in before.items())


def test_statistics_survive_save_and_load_bit_for_bit(small, tmp_path):
    agent = classic.PPO("tests/Clock-v0", small(normalize_observations=True, normalize_rewards=True)).learn(100)
    agent.save(tmp_path)
    loaded = classic.PPO.load(tmp_path)
    state = loaded.normalizer.state()
    assert all(torch.equal(x, state[name]) for name, x in agent.normalizer.state().items())
    assert loaded.evaluate(episodes=3) == agent.evaluate(episodes=3)


def test_normalising_makes_badly_scaled_numbers_learnable(small, learning_seed):
    """Signs of +- 1e-3 around 5 say nothing to a fresh network; Far rewards a match with 1e4."""
    settings = {"gamma": 0.5, "learning_rate": 1e-2, "seed": learning_seed}
    plain = classic.PPO("tests/Far-v0", small(**settings)).learn(3_000).evaluate(episodes=50)
    scaled = classic.PPO("tests/Far-v0", small(normalize_observations=True, normalize_rewards=True, **settings))
    assert plain["mean_return"] < 3.5e4 and scaled.learn(3_000).evaluate(episodes=50)["mean_return"] > 4.5e4


def test_images_are_not_normalised_a_second_time(small):
    with pytest.raises(ValueError, match="normalize_observations=True, but environment 'tests/PixelsObservation-v0'"):
        classic.PPO("tests/PixelsObservation-v0", small(normalize_observations=True))


class FarOff(gymnasium.Env):
    """Reward 1 for naming the sign that was shown, one sign an episode; the signs lie one apart, far from 0."""

    action_space = Discrete(2)

    def __init__(self, space, offset):
        self.observation_space, self.offset = space, offset

    def show(self, sign):
        if isinstance(self.observation_space, Dict):
            return {"x": np.array([self.offset + sign], np.float64), "n": 1}
        return np.array([self.offset + sign], self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sign = int(self.np_random.integers(2))
        return self.show(self.sign), {}

    def step(self, action):
        return self.show(0), float(action == self.sign), True, False, {}


WIDE = {
    "float64": (Box(-np.inf, np.inf, (1,), np.float64), 1.7e9),
    "int64": (Box(-(2**62), 2**62, (1,), np.int64), 2**40),
    "uint32": (Box(0, 2**32 - 1, (1,), np.uint32), 4_000_000_000),
    "Dict": (Dict({"x": Box(-np.inf, np.inf, (1,), np.float64), "n": Discrete(2)}), 1.7e9),
}


@pytest.mark.parametrize(("space", "offset"), WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("mode", ["next_step", "same_step"])
def test_the_mean_is_subtracted_before_rounding_to_float32(mode, space, offset, small, tmp_path):
    """In float32 neighbouring signs would be the same number: in training, evaluation, prediction, and once saved."""
    args = small(normalize_observations=True, learning_rate=1e-2, gamma=0.5, autoreset_mode=mode, num_envs=8)
    agent = classic.PPO(lambda: FarOff(space, offset), args).learn(3_000)
    assert 0.15 < agent.normalizer.observations.variance[-1] < 0.3  # of 0 and 1
    assert agent.evaluate(episodes=50)["mean_return"] > 0.95
    agent.save(tmp_path)
    loaded = classic.PPO.load(tmp_path, lambda: FarOff(space, offset))
    for sign in (0, 1):
        assert loaded.predict(FarOff(space, offset).show(sign))[0] == sign
    assert loaded.evaluate(episodes=50) == agent.evaluate(episodes=50)


def test_values_beyond_float32_are_refused(small):
    with pytest.raises(BrokenEnvironmentError, match="observation is non-finite"):
        classic.PPO(lambda: FarOff(WIDE["float64"][0], 1e300), small()).learn(10)
