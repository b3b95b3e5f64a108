"""Wrappers around each copy: copy arrays, catch the checker's warnings, record episodes; and CartPoleNoVel-v1."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv

MAX_ACTIONS = 100_000
"""Actions of one episode that are recorded, about 20 MB a copy; a resumed run would have to repeat them all."""


class CaughtWarning(NamedTuple):
    """A warning as it travels between processes."""

    text: str
    category: type[Warning]
    file: str
    line: int


class CopyArrays(gymnasium.Wrapper):
    """Copy what the environment returns, since it may write its next observation into the same array."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return copied(observation), copied(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        reward = reward if type(reward) is float else copied(reward)
        return copied(observation), reward, terminated, truncated, copied(info) if info else {}


class OneCopy(CopyArrays):
    """The wrapper around each copy, in this process or in one of its own.

    Gymnasium's checker warns at the first reset and the first step. Its warnings are kept for :func:`warn_once`, so
    that they appear once rather than once per copy; if that call crashes, they become notes of the exception.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self._unchecked, self._caught = {"reset", "step"}, []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        if "reset" in self._unchecked:
            return self._catching("reset", lambda: super(OneCopy, self).reset(seed=seed, options=options))
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step."""
        if "step" in self._unchecked:
            return self._catching("step", lambda: super(OneCopy, self).step(action))
        return super().step(action)

    def caught_warnings(self) -> list[CaughtWarning]:
        """Return the warnings since the last call of this."""
        caught, self._caught = self._caught, []
        return caught

    def own_statistics(self) -> list[str]:
        """Return this copy's wrappers that normalise by statistics of their own."""
        return normalizing_wrappers(self.env)

    def time_limit(self) -> int | None:
        """Return the steps after which an episode is truncated; None if that is unknown."""
        if self.env.has_wrapper_attr("_max_episode_steps"):  # gymnasium.wrappers.TimeLimit
            return self.env.get_wrapper_attr("_max_episode_steps")
        return None if self.env.spec is None else self.env.spec.max_episode_steps

    def _catching(self, name: str, call: Callable[[], Any]) -> Any:
        self._unchecked.discard(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = call()
            except BaseException as error:
                for warning in caught:
                    error.add_note(re.sub(r"\x1b\[\d*m", "", str(warning.message)))  # without its colours
                raise
        self._caught += [CaughtWarning(str(x.message), x.category, x.filename, x.lineno) for x in caught]
        return result


class RecordedEpisode(gymnasium.Wrapper):
    """Record how the running episode began and its actions, so that it can be replayed to the same place.

    Only once :meth:`record` says that it may be saved.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.seed: int | None = None
        self.generator: Mapping[str, Any] = {}
        self.actions: list[Any] = []
        self.recording = False
        self.complete = False
        """Whether everything since the episode's beginning is recorded."""

    def record(self, wanted: bool) -> None:
        """Record episodes from the next one on, or stop and forget."""
        self.recording = wanted
        if not wanted:
            self.actions, self.complete = [], False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; record its seed, or else the generator's state before it."""
        self.seed, self.actions, self.complete = seed, [], self.recording
        self.generator = {} if seed is not None else self.generator_state()
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step; record its action."""
        if self.complete:
            self.actions.append(np.array(action))
            if len(self.actions) > MAX_ACTIONS:
                self.actions, self.complete = [], False
                warnings.warn(
                    f"an episode has gone on for more than {MAX_ACTIONS:,} steps: they are no longer recorded, so a "
                    "run resumed from here begins new episodes (a time limit, max_episode_steps, ends them)",
                    stacklevel=2,
                )
        return self.env.step(action)

    def replay(self, seed: int | None, generator: Mapping[str, Any], actions: np.ndarray) -> tuple[Any, list[Any]]:
        """Begin a recorded episode and repeat its actions; return the last observation and every reward."""
        if seed is None and generator:
            self.unwrapped.np_random.bit_generator.state = generator
        observation, _ = self.reset(seed=seed)
        rewards = []
        for action in actions:
            observation, reward, *_ = self.step(action)
            rewards.append(reward)
        return observation, rewards

    def generator_state(self) -> Mapping[str, Any]:
        """Return the state of the environment's generator; {} if it is not numpy's."""
        return getattr(getattr(self.unwrapped.np_random, "bit_generator", None), "state", {})


class HideVelocity(gymnasium.ObservationWrapper):
    """CartPole without its velocities, so that a policy must remember in order to balance the pole.

    RL Zoo's environment of this name sets the two velocities to 0 instead, which hides as much.
    """

    KEPT = (0, 2)
    """The position of the cart and the angle of the pole."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        space: Any = env.observation_space
        self.observation_space = Box(space.low[list(self.KEPT)], space.high[list(self.KEPT)], dtype=space.dtype)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Drop the velocities: [4] -> [2]."""
        return observation[list(self.KEPT)]


def make_cartpole_no_vel(**kwargs: Any) -> gymnasium.Env:
    """Make CartPole with its velocities hidden; the time limit is the registration's."""
    return HideVelocity(gymnasium.make("CartPole-v1", max_episode_steps=-1, **kwargs))


if "CartPoleNoVel-v1" not in gymnasium.registry:
    gymnasium.register(
        "CartPoleNoVel-v1",
        entry_point="classic.envs.wrappers:make_cartpole_no_vel",
        max_episode_steps=500,
        reward_threshold=475.0,
    )


def copied(value: Any) -> Any:
    """Return a value with arrays of its own."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(copied(part) for part in value)
    return value


_warned: set[tuple[str, str, int]] = set()


def warn_once(caught: list[CaughtWarning]) -> None:
    """Issue caught warnings, each text and place once per process, as Python does for a module's own."""
    for text, category, file, line in caught:
        if (text, file, line) not in _warned:
            _warned.add((text, file, line))
            warnings.warn_explicit(text, category, file, line)


def normalizing_wrappers(envs: Any) -> list[str]:
    """Return the names of wrappers around an environment, or a vector of them, that keep running statistics."""
    names, layer = [], envs
    while isinstance(layer, (gymnasium.Wrapper, gymnasium.vector.VectorWrapper)):
        # Gymnasium's own and others' hold them in an object of this name.
        if any(type(value).__name__ == "RunningMeanStd" for value in vars(layer).values()):
            names.append(type(layer).__name__)
        layer = layer.env
    return names


def all_have(envs: VectorEnv, method: str) -> bool:
    """Whether there are separate copies and all have a method; calling it in a process without it would end that."""
    inner = envs.unwrapped
    if not isinstance(inner, (gymnasium.vector.SyncVectorEnv, gymnasium.vector.AsyncVectorEnv)):
        return False
    return all(inner.call("has_wrapper_attr", method))


def call_each(envs: VectorEnv, method: str) -> list[Any]:
    """Call a method of each copy; [] if not all have it."""
    return list(envs.unwrapped.call(method)) if all_have(envs, method) else []  # pyright: ignore
