"""Save running episodes, and restore them in another process exactly where they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv, VectorEnv
from torch import Tensor

from classic.envs.wrappers import RecordedEpisode

VECTOR_STATE = ("state", "steps", "prev_done")
"""What the vector versions of Gymnasium's classic control keep between steps, beside their generator."""


def episode_state(envs: VectorEnv) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return (tensors, JSON) from which :func:`restore_episodes` restores the running episodes; None if it cannot.

    Gymnasium's classic-control vector environments expose their state. Copies stepped one after another are described
    by how each episode began and its actions so far. Separate processes and other vector environments cannot be saved.
    """
    inner = envs.unwrapped
    if isinstance(inner, SyncVectorEnv):
        recorded: list[RecordedEpisode] = list(inner.envs)  # pyright: ignore
        if not all(env.complete for env in recorded):
            return None
        begun = [{"seed": env.seed, "generator": env.generator} for env in recorded]
        now = [env.generator_state() for env in recorded]
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
    """Restore what :func:`episode_state` returned.

    Returns:
        Each copy's observation and rewards after its actions were replayed, to be compared with those saved ([] if
        nothing had to be replayed). None: a generator's state differs, so the environment did not come back the same.
    """
    inner: Any = envs.unwrapped
    if not isinstance(inner, SyncVectorEnv):
        for name in VECTOR_STATE:
            setattr(inner, name, tensors[name].numpy().copy())
        inner.np_random.bit_generator.state = state["generator"]
        return []
    replayed = []
    for i, (env, begun, generator) in enumerate(zip(inner.envs, state["begun"], state["generators"], strict=True)):
        recorded: Any = env
        actions = tensors[f"actions.{i}"].numpy() if f"actions.{i}" in tensors else np.array([])
        replayed.append(recorded.replay(begun["seed"], begun["generator"], actions))
        if recorded.generator_state() != generator:
            return None
    inner._autoreset_envs = tensors["autoreset"].numpy().copy()
    return replayed
