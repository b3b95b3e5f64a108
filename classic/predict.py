"""Predict actions: one observation or a batch in, what env.step takes out, and the recurrent state if there is one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classic.envs.environments import Environments
from classic.envs.masks import mask_row
from classic.envs.spaces import batch_of_one, is_batch, is_finite, stacked, to_env_actions
from classic.networks.actor_critic import ActorCritic

MAX_FORGOTTEN = 3
"""Consecutive predictions without a state before a warning: single ones are the beginnings of episodes."""


class ForgottenState:
    """Warn once if a loop leaves out the state that the last call returned, which resets the recurrent layer."""

    def __init__(self) -> None:
        self._consecutive = 0

    def notice(self, forgotten: bool, recurrent: str | None) -> None:
        """Count a call of :meth:`classic.PPO.predict` with or without its state."""
        if self._consecutive == MAX_FORGOTTEN:
            return
        self._consecutive = self._consecutive + 1 if forgotten else 0
        if self._consecutive == MAX_FORGOTTEN:
            warnings.warn(
                f"predict was called {MAX_FORGOTTEN} consecutive times without a state, so the recurrent layer "
                f"(recurrent={recurrent!r}) was reset each time: inside an episode pass on what the last call "
                "returned, action, state = agent.predict(observation, state=state)",
                stacklevel=3,
            )


def predict(
    envs: Environments,
    network: ActorCritic,
    view: Callable[[Tensor], Tensor],
    generator: torch.Generator | None,
    observation: Any,
    state: np.ndarray | None,
    episode_start: Any,
    action_masks: Any,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Choose actions outside of training; see :meth:`classic.PPO.predict`.

    Args:
        envs: the environment's spaces.
        network: the policy.
        view: normalises observations.
        generator: draws from the policy; None takes the most likely action.
        observation, state, episode_start, action_masks: what the user gave.
    """
    where, space = f"environment {envs.env_id!r}", envs.observation_space
    shape = f"of shape {space.shape}" if space.shape is not None else str(space)
    try:
        observation = stacked(space, observation)
        batched = is_batch(space, observation)
        array = envs.encode(observation if batched else batch_of_one(space, observation))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{where} has observations {shape}; predict takes one or a batch of them: {error}") from None
    if not is_finite(array).all():
        raise ValueError(f"observation for {where} is non-finite: {array.tolist()}")
    count = len(array)
    memory = network.initial_state(count)
    if state is not None:
        state = np.asarray(state, dtype=np.float32)
        if memory is None or state.shape != memory.shape:
            expected = "no state: the policy is not recurrent" if memory is None else f"a state {tuple(memory.shape)}"
            raise ValueError(f"predict for {where} takes {expected}, got {state.shape}")
        memory = torch.from_numpy(state.copy())
    starts = torch.from_numpy(np.array(np.broadcast_to(np.asarray(episode_start, dtype=bool), (count,))))
    masks = envs.observed_masks(torch.from_numpy(array))
    if action_masks is not None:
        if not envs.actions.choices:
            raise ValueError(f"{where} has continuous actions, which cannot be masked")
        given = action_masks if batched else [action_masks]
        if len(given) != count:
            raise ValueError(f"{where}: {count} observations need as many action masks, got {len(given)}")
        masks = torch.from_numpy(np.stack([mask_row(row, envs.actions, f"{where}: an action mask") for row in given]))
    actions, _, memory = network.act(
        view(torch.from_numpy(array)), generator, action_masks=masks, starts=starts, state=memory
    )
    chosen = to_env_actions(actions, envs.action_space, envs.squash)
    return (chosen if batched else chosen[0]), None if memory is None else memory.numpy()
