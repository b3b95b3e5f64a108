"""Evaluation: whole episodes on fresh environments, shared out so that short episodes do not count twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from classic.actor_critic import ActorCritic
from classic.envs import Environments
from classic.seeds import derive_seeds

MAX_COPIES = 32


def evaluate_policy(
    make_envs: Callable[[int], AbstractContextManager[Environments]],
    network: ActorCritic,
    episodes: int,
    *,
    deterministic: bool,
    seed: int,
    view: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Mean and spread of the undiscounted return over ``episodes`` episodes.

    Each copy plays a share fixed beforehand. Taking the first episodes to finish anywhere would favour short ones.

    Args:
        make_envs: from a number of copies to that many or fewer, and what becomes of them at the end.
        network: the policy.
        episodes: how many.
        deterministic: take the most likely action instead of a sampled one.
        seed: of the environments and the draws.
        view: what the network sees of observations (their normalised form, with the statistics as they are).
    Returns:
        mean_return, std_return (population) and mean_length in steps.
    Raises:
        ValueError: episodes is below 1, or the seed is negative.
        BrokenEnvironmentError: see :class:`Environments`.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be 1 or more, got {episodes}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    generator = None if deterministic else torch.Generator().manual_seed(derive_seeds(seed, "prediction", 1)[0])
    returns, lengths = [], []
    with make_envs(min(episodes, MAX_COPIES)) as envs:
        left = [(episodes + i) // envs.num_envs for i in range(envs.num_envs)]
        envs.reset(seed, "evaluation")
        state = network.initial_state(envs.num_envs)
        while len(returns) < episodes:
            actions, _, state = network.act(
                view(envs.observations), generator, action_masks=envs.action_masks, starts=envs.starting, state=state
            )
            for episode in envs.step(actions).episodes:
                if left[episode.env]:
                    left[episode.env] -= 1
                    returns.append(episode.total_reward)
                    lengths.append(episode.length)
    return {
        "mean_return": float(np.mean(returns)),
        "std_return": float(np.std(returns)),
        "mean_length": float(np.mean(lengths)),
    }
