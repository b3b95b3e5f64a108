"""Copies: what stands around each copy of an environment, in this process or in one of its own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv


class Heard(NamedTuple):
    """A warning as it travels between processes."""

    text: str
    category: type[Warning]
    file: str
    line: int


class OwnArrays(gymnasium.Wrapper):
    """Hands out copies, since an environment may write its next observation into the same array."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return copied(observation), copied(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        reward = reward if type(reward) is float else copied(reward)
        return copied(observation), reward, terminated, truncated, copied(info) if info else {}


class OneCopy(OwnArrays):
    """The outermost wrapper of each copy.

    Gymnasium's checker speaks at the first reset and the first step. Its words are kept for :func:`pass_on`, so that
    they appear once rather than once a copy; where that call crashes, they are notes of the exception.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self._unheard, self._heard = {"reset", "step"}, []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        if "reset" in self._unheard:
            return self._listening("reset", lambda: super(OneCopy, self).reset(seed=seed, options=options))
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step."""
        if "step" in self._unheard:
            return self._listening("step", lambda: super(OneCopy, self).step(action))
        return super().step(action)

    def heard_warnings(self) -> list[Heard]:
        """What was said since the last call of this."""
        heard, self._heard = self._heard, []
        return heard

    def own_statistics(self) -> list[str]:
        """Wrappers of this copy that normalise by statistics of their own."""
        return normalizing_layers(self.env)

    def time_limit(self) -> int | None:
        """Steps after which an episode is cut, where that is known."""
        if self.env.has_wrapper_attr("_max_episode_steps"):  # gymnasium.wrappers.TimeLimit
            return self.env.get_wrapper_attr("_max_episode_steps")
        return None if self.env.spec is None else self.env.spec.max_episode_steps

    def _listening(self, name: str, call: Callable[[], Any]) -> Any:
        self._unheard.discard(name)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                result = call()
            except BaseException as error:
                for warning in heard:
                    error.add_note(re.sub(r"\x1b\[\d*m", "", str(warning.message)))  # without its colours
                raise
        self._heard += [Heard(str(x.message), x.category, x.filename, x.lineno) for x in heard]
        return result


def copied(value: Any) -> Any:
    """A value whose arrays are its own."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(copied(part) for part in value)
    return value


_passed_on: set[tuple[str, str, int]] = set()


def pass_on(heard: list[Heard]) -> None:
    """Warn of what was heard, each place and text once a process, as Python does by itself for a module's own."""
    for text, category, file, line in heard:
        if (text, file, line) not in _passed_on:
            _passed_on.add((text, file, line))
            warnings.warn_explicit(text, category, file, line)


def normalizing_layers(envs: Any) -> list[str]:
    """Names of the wrappers around an environment, or a vector of them, that keep running statistics."""
    names, layer = [], envs
    while isinstance(layer, (gymnasium.Wrapper, gymnasium.vector.VectorWrapper)):
        # Gymnasium's own and others' hold them in an object of this name.
        if any(type(value).__name__ == "RunningMeanStd" for value in vars(layer).values()):
            names.append(type(layer).__name__)
        layer = layer.env
    return names


def all_copies_have(envs: VectorEnv, method: str) -> bool:
    """Whether there are copies that could be asked, and all have a method; to ask a process without it would end it."""
    inner = envs.unwrapped
    if not isinstance(inner, (gymnasium.vector.SyncVectorEnv, gymnasium.vector.AsyncVectorEnv)):
        return False
    return all(inner.call("has_wrapper_attr", method))


def ask_copies(envs: VectorEnv, method: str) -> list[Any]:
    """What a method of each copy answers; [] where not all have it."""
    return list(envs.unwrapped.call(method)) if all_copies_have(envs, method) else []  # pyright: ignore
