"""Running episodes: what it takes to save them, and to set them up again in another process exactly where they were."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv, VectorEnv
from torch import Tensor

VECTOR_STATE = ("state", "steps", "prev_done")
"""What the vector versions of Gymnasium's classic control keep between steps, beside their generator."""


MAX_ACTIONS = 100_000
"""Actions of one episode that are remembered, some 20 MB a copy; a resumed run would have to repeat them all."""


class RecordedEpisode(gymnasium.Wrapper):
    """Remembers how the running episode began and what was done in it: done again, it leads to the same place.

    Only once :meth:`record` says that somebody can save it.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.seed: int | None = None
        self.generator: Mapping[str, Any] = {}
        self.actions: list[Any] = []
        self.recording = False
        self.whole = False
        """Whether everything since the episode's beginning is there."""

    def record(self, wanted: bool) -> None:
        """Remember episodes, from the next one on, or forget what there is."""
        self.recording = wanted
        if not wanted:
            self.actions, self.whole = [], False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; what its generator was before is remembered."""
        self.seed, self.actions, self.whole = seed, [], self.recording
        self.generator = {} if seed is not None else _generator_state(self)
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step; its action is remembered."""
        if self.whole:
            self.actions.append(np.array(action))
            if len(self.actions) > MAX_ACTIONS:
                self.actions, self.whole = [], False
                warnings.warn(
                    f"an episode has gone on for more than {MAX_ACTIONS:,} steps: they are no longer remembered, so a "
                    "run resumed from here begins new episodes (a time limit, max_episode_steps, ends them)",
                    stacklevel=2,
                )
        return self.env.step(action)

    def play_again(self, seed: int | None, generator: Mapping[str, Any], actions: np.ndarray) -> tuple[Any, list[Any]]:
        """Begin a remembered episode and repeat its actions; returns the last observation and every reward."""
        if seed is None and generator:
            self.unwrapped.np_random.bit_generator.state = generator
        observation, _ = self.reset(seed=seed)
        rewards = []
        for action in actions:
            observation, reward, *_ = self.step(action)
            rewards.append(reward)
        return observation, rewards


def _generator_state(env: gymnasium.Env) -> Mapping[str, Any]:
    """Where an environment's generator stands; {} of one that is not numpy's."""
    return getattr(getattr(env.unwrapped.np_random, "bit_generator", None), "state", {})


def episode_state(envs: VectorEnv) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, JSON) from which :func:`restore_episodes` sets the running episodes up again, or None if nothing does.

    Gymnasium's classic-control vector environments say what they keep. Copies stepped one after another are described
    by how each episode began and the actions since. Processes of their own and other vector environments keep theirs.
    """
    inner = envs.unwrapped
    if isinstance(inner, SyncVectorEnv):
        recorded: list[Any] = list(inner.envs)
        if not all(env.whole for env in recorded):
            return None
        begun = [{"seed": env.seed, "generator": env.generator} for env in recorded]
        now = [_generator_state(env) for env in recorded]
        tensors = {
            f"actions.{i}": torch.from_numpy(np.stack(env.actions)) for i, env in enumerate(recorded) if env.actions
        }
        tensors["autoreset"] = torch.from_numpy(inner._autoreset_envs.copy())
        return tensors, {"begun": begun, "generators": now}
    if type(inner).__module__.startswith("gymnasium.envs.classic_control"):
        tensors = {name: torch.from_numpy(np.array(getattr(inner, name))) for name in VECTOR_STATE}
        return tensors, {"generator": inner.np_random.bit_generator.state}
    return None


def restore_episodes(
    envs: VectorEnv, tensors: dict[str, Tensor], state: dict[str, Any]
) -> list[tuple[Any, list[Any]]] | None:
    """Set up what :func:`episode_state` described.

    Returns:
        Each copy's observation after its actions were repeated, and the rewards on the way, to be compared with what
        was saved ([] where nothing had to be repeated). None: a generator stands elsewhere than it did, so the
        environment did not come back the same.
    """
    inner: Any = envs.unwrapped
    if not isinstance(inner, SyncVectorEnv):
        for name in VECTOR_STATE:
            setattr(inner, name, tensors[name].numpy().copy())
        inner.np_random.bit_generator.state = state["generator"]
        return []
    came_back = []
    for i, (env, begun, generator) in enumerate(zip(inner.envs, state["begun"], state["generators"], strict=True)):
        recorded: Any = env
        actions = tensors[f"actions.{i}"].numpy() if f"actions.{i}" in tensors else np.array([])
        came_back.append(recorded.play_again(begun["seed"], begun["generator"], actions))
        if _generator_state(env) != generator:
            return None
    inner._autoreset_envs = tensors["autoreset"].numpy().copy()
    return came_back
