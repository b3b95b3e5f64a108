"""Which registered task an environment is, whichever way it is named: the task has a preset, not its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import gymnasium
from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id

from classic.envs.making import CRASHES, EnvLike


def registered_id(env_id: str) -> str:
    """An id as it is registered: without its module, and with the newest version where it names none."""
    name = env_id.rpartition(":")[2]
    try:
        namespace, task, version = parse_env_id(name)
    except gymnasium.error.Error:
        return name  # what is wrong with it is said where it is made
    return get_env_id(namespace, task, find_highest_version(namespace, task) if version is None else version)


def identify(env: EnvLike, *, in_this_process: bool = True) -> tuple[str | None, EnvLike]:
    """The registered id of the task (None: it has none), and what the training copies are to be made from.

    A function is called for that, and what it made is the first of the copies, if they are to live in this process.
    """
    if isinstance(env, str):
        return registered_id(env), env
    if isinstance(env, gymnasium.Env):
        return _spec_id(env), env
    if not callable(env):
        return None, env
    try:
        first: Any = env()
    except CRASHES:
        return None, env  # it is called again where copies are made, and that error says more
    if not isinstance(first, gymnasium.Env):
        return None, env
    task = _spec_id(first)
    if not in_this_process:
        first.close()
        return task, env
    return task, _beginning_with(first, env)


def _spec_id(env: gymnasium.Env) -> str | None:
    spec = env.unwrapped.spec
    return None if spec is None else spec.id


def _beginning_with(first: gymnasium.Env, make: Callable[[], gymnasium.Env]) -> Callable[[], gymnasium.Env]:
    waiting = [first]

    @wraps(make)
    def made() -> gymnasium.Env:
        return waiting.pop() if waiting else make()

    return made
