"""Wrappers: reused arrays are copied, and the checker's warnings appear once."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Tuple
from gymnasium.vector import AutoresetMode, VectorEnv

import classic
from classic.envs import wrappers
from classic.envs.environments import Environments


class Reusing(gymnasium.Env):
    """Counts to three in arrays that are allocated once and shared by all copies of a process."""

    observation_space = Dict({"x": Box(0, 9, (1,), np.float32), "pair": Tuple([Box(0, 9, (1,), np.float32)])})
    action_space = Discrete(2)
    count, reward, mask = (np.zeros(shape, dtype) for shape, dtype in (((1,), "f4"), ((), "f8"), ((2,), "i1")))

    def _look(self):
        self.count[:] = self.reward[...] = self.t
        self.mask[:] = self.t % 2, 1
        return {"x": self.count, "pair": (self.count,)}, {"action_mask": self.mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._look()

    def step(self, action):
        self.t += 1
        observation, info = self._look()
        return observation, self.reward, False, self.t == 3, info


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("wrappers", [(), ("TimeLimit",)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_arrays_used_again_are_copied_at_each_step(vectorization, wrappers):
    env = (lambda: gymnasium.wrappers.TimeLimit(Reusing(), 3)) if wrappers else Reusing
    envs = Environments(env, 2, "same_step", vectorization=vectorization)
    envs.record_episodes(True)
    envs.reset(0)
    seen = [envs.step(torch.ones(2, dtype=torch.int64)) for _ in range(3)]
    assert [step.rewards.tolist() for step in seen] == [[1, 1], [2, 2], [3, 3]]
    assert seen[-1].final_observations.tolist() == [[3, 3], [3, 3]] and envs.observations.tolist() == [[0, 0]] * 2
    assert envs.action_masks.tolist() == [[False, True]] * 2
    if vectorization == "sync":
        tensors, state = envs.state()
        again = Environments(env, 2, "same_step")
        assert again.restore(tensors, state)
    envs.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_wrapper_that_keeps_observations_keeps_different_ones():
    class Plain(Reusing):
        observation_space = Box(0, 9, (1,), np.float32)

        def _look(self):
            super()._look()
            return self.count, {}

    class LastTwo(gymnasium.Wrapper):
        observation_space = Box(0, 9, (2, 1), np.float32)

        def reset(self, **kwargs):
            self.last, info = self.env.reset(**kwargs)
            return np.stack([self.last, self.last]), info

        def step(self, action):
            before = self.last
            self.last, *rest = self.env.step(action)
            return np.stack([before, self.last]), *rest

    gymnasium.wrappers.LastTwo = LastTwo
    try:
        envs = Environments(Plain, 1, wrappers=("LastTwo",))
    finally:
        del gymnasium.wrappers.LastTwo
    envs.reset(0)
    for t in (1, 2):
        envs.step(torch.zeros(1, dtype=torch.int64))
        assert envs.observations.tolist() == [[t - 1, t]]


class Batched(VectorEnv):
    """Two copies of one step; its last observations are one batch in the parts of a Dict."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    single_observation_space = Dict({"x": Box(0, 9, (1,), np.float32), "n": Discrete(3)})
    single_action_space = Discrete(2)

    def __init__(self, num_envs=1, **kwargs):
        self.num_envs = num_envs

    def _look(self, x):
        return {"x": np.full((self.num_envs, 1), x, "f4"), "n": np.full(self.num_envs, x)}

    def reset(self, *, seed=None, options=None):
        return self._look(0), {}

    def step(self, actions):
        yes = np.ones(self.num_envs, dtype=bool)
        return self._look(0), np.ones(self.num_envs), yes, ~yes, {"final_obs": self._look(2)}


def test_last_observations_may_be_one_batch_of_parts(small):
    gymnasium.register("tests/Batched-v0", vector_entry_point=Batched)
    envs = Environments("tests/Batched-v0", 2)
    envs.reset(0)
    step = envs.step(torch.zeros(2, dtype=torch.int64))
    assert step.final_observations.tolist() == [[0, 0, 1, 2]] * 2  # Dict's keys in their order: n, x
    assert classic.PPO("tests/Batched-v0", small()).learn(64).evaluate(3)["mean_return"] == 1


class Careless(gymnasium.Env):
    """Returns float64 although its space is float32, so every copy warns."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1), {}

    def step(self, action):
        return np.zeros(1), 1.0, True, False, {}


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_each_checker_warning_appears_once(vectorization, small, monkeypatch, capfd):
    monkeypatch.setattr(wrappers, "_warned", set())
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        agent = classic.PPO(Careless, small(vectorization=vectorization)).learn(64)
        agent.evaluate(6)
        agent.close()
        classic.PPO(Careless, small()).learn(64)
    places = [(str(x.message), x.lineno) for x in heard]
    assert places and len(set(places)) == len(places)
    assert "WARN" not in capfd.readouterr().err  # of the processes


@pytest.mark.filterwarnings("ignore:.*(ERROR|closing).*")
def test_a_crash_in_a_process_shows_the_checkers_warnings(small):
    class Alone(Careless):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)[0]

    with pytest.raises(classic.BrokenEnvironmentError, match=r"`env.reset\(\)` was not a tuple"):
        classic.PPO(Alone, small(vectorization="async", num_envs=2)).learn(10)
