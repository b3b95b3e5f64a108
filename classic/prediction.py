"""Prediction: one observation or a batch in, what env.step takes out; with a memory, its state too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classic.actor_critic import ActorCritic
from classic.envs import Environments
from classic.spaces import batch_of_one, is_batch, to_env_actions


def predict(
    envs: Environments,
    network: ActorCritic,
    observation: Any,
    generator: torch.Generator | None,
    *,
    view: Callable[[Tensor], Tensor],
    state: np.ndarray | None,
    episode_start: Any,
    action_masks: Any,
) -> tuple[np.ndarray, np.ndarray | None]:
    """See :meth:`classic.PPO.predict`; ``generator`` None: the most likely action; ``view``: what the network sees."""
    where, space = f"environment {envs.env_id!r}", envs.observation_space
    shape = f"of shape {space.shape}" if space.shape is not None else str(space)
    try:
        batched = is_batch(space, observation)
        array = envs.encode(observation if batched else batch_of_one(space, observation))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{where} has observations {shape}; predict takes one or a batch of them: {error}") from None
    if not np.isfinite(array).all():
        raise ValueError(f"observation for {where} is not finite: {array.tolist()}")
    count = len(array)
    memory = network.initial_state(count)
    if state is not None:
        if memory is None or state.shape != memory.shape:
            expected = "no state: there is no memory" if memory is None else f"a state {tuple(memory.shape)}"
            raise ValueError(f"predict for {where} takes {expected}, got {state.shape}")
        memory = torch.from_numpy(np.array(state, dtype=np.float32))
    starts = torch.from_numpy(np.array(np.broadcast_to(np.asarray(episode_start, dtype=bool), (count,))))
    masks = None
    if action_masks is not None:
        masks = torch.from_numpy(np.array(action_masks, dtype=bool).reshape(count, -1))
        if not envs.actions.choices or masks.shape[1] != envs.actions.num_outputs:
            raise ValueError(f"{where} has {envs.actions.num_outputs} options to mask, got {masks.shape[1]} entries")
    actions, _, memory = network.act(
        view(torch.from_numpy(array)), generator, action_masks=masks, starts=starts, state=memory
    )
    chosen = to_env_actions(actions, envs.action_space, envs.squash)
    return (chosen if batched else chosen[0]), None if memory is None else memory.numpy()
