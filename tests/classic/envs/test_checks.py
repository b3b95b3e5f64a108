"""Warnings: statistics of each copy's own, actions that a Gaussian does not reach, a memory that is not given back."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

import classic
from classic.envs.checks import unexplored


class Scaled(gymnasium.Env):
    """One step an episode, with actions of any bounds."""

    observation_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, action_space=None):
        self.action_space = action_space or Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(1, dtype=np.float32), 1.0, True, False, {}


class RunningMeanStd:
    """As many packages name it."""


class Whitened(gymnasium.Wrapper):
    """A wrapper of one's own that keeps statistics."""

    def __init__(self, env):
        super().__init__(env)
        self.statistics = RunningMeanStd()


@pytest.mark.parametrize(
    ("env", "wrappers", "names"),
    [
        ("Pendulum-v1", ("NormalizeObservation", "NormalizeReward"), "NormalizeObservation and NormalizeReward"),
        (lambda: gymnasium.wrappers.NormalizeReward(Scaled()), ("FlattenObservation",), "NormalizeReward"),
        (lambda: Whitened(Scaled()), (), "Whitened"),
    ],
)
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_statistics_of_each_copy_are_warned_of_with_the_settings_to_use(env, wrappers, names, vectorization, small):
    words = rf"in {names}: .*normalize_observations=True and normalize_rewards=True"
    agent = classic.PPO(env, small(wrappers=wrappers, vectorization=vectorization, num_envs=2))
    with pytest.warns(UserWarning, match=words):
        agent.learn(8)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        agent.learn(8)
    agent.close()


def test_statistics_of_a_vector_of_copies_are_warned_of(small):
    from gymnasium.wrappers.vector import NormalizeObservation

    gymnasium.register(
        "tests/NormalizedVector-v0",
        vector_entry_point=lambda num_envs, **_: NormalizeObservation(
            gymnasium.vector.SyncVectorEnv([Scaled] * num_envs)
        ),
    )
    with pytest.warns(UserWarning, match="statistics of its own in NormalizeObservation"):
        classic.PPO("tests/NormalizedVector-v0", small()).learn(8)


@pytest.mark.parametrize(
    ("low", "high", "log_std", "fine"),
    [
        (-1, 1, 0.0, True),
        (-1, 1, -2.0, True),  # HalfCheetah's preset
        (-0.4, 0.4, 0.0, True),  # Humanoid
        (-3, 3, 0.0, True),  # InvertedPendulum
        (0, 1, 0.0, True),
        (0, 1000, 0.0, False),
        (10, 20, 0.0, False),
        (-10, 10, 0.0, False),
        (-10, 10, 1.5, True),  # a standard deviation of 4.5
        (-0.01, 0.01, 0.0, False),
        (0.9, 1.1, -2.0, False),
        (0, np.inf, 0.0, False),
    ],
)
def test_bounds_that_a_gaussian_around_zero_does_not_cover(low, high, log_std, fine, small):
    space = Box(np.float32(low), np.float32(high), (1,), np.float32)
    assert (unexplored(space, log_std) is None) == fine
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        classic.PPO(lambda: Scaled(space), small(log_std_init=log_std)).learn(8)
    said = [str(x.message) for x in heard if "actions" in str(x.message)]
    assert len(said) == (not fine) and all("squash=True" in words for words in said)
    if np.isfinite(high):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            classic.PPO(lambda: Scaled(space), small(squash=True)).learn(8)


def test_no_preset_is_warned_of():
    for env_id in ("Pendulum-v1", "CartPoleNoVel-v1"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            classic.PPO(env_id, classic.PPOArgs(quiet=True)).learn(1)


def test_a_recurrent_state_that_is_not_passed_on_is_warned_of_once(small):
    agent = classic.PPO("tests/Recall-v0", small(recurrent="gru"))
    observation = np.zeros(2, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):  # as it is meant
            state = None
            for _ in range(4):
                _, state = agent.predict(observation, state=state)
        for _ in range(5):
            agent.predict(observation, episode_start=True)
        for _ in range(5):
            classic.PPO("tests/Recall-v0", small()).predict(observation)
    with pytest.warns(UserWarning, match=r"without a state, so the recurrent layer .* was reset each time") as heard:
        for _ in range(20):
            agent.predict(observation)
    assert len(heard) == 1
