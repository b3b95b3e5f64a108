"""Evaluation: whole episodes on fresh environments, shared out so that short episodes do not count twice."""

from __future__ import annotations

import numpy as np
import torch

from classic.actor_critic import ActorCritic
from classic.envs import Environments

MAX_COPIES = 32


def evaluate_policy(
    env_id: str, network: ActorCritic, episodes: int, *, deterministic: bool, seed: int
) -> dict[str, float]:
    """Mean and spread of the undiscounted return over ``episodes`` episodes.

    Each copy plays a share fixed beforehand. Taking the first episodes to finish anywhere would favour short ones.

    Returns:
        mean_return, std_return (population) and mean_length in steps.
    Raises:
        ValueError: episodes is below 1.
        BrokenEnvironmentError: see :class:`Environments`.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be 1 or more, got {episodes}")
    copies = min(episodes, MAX_COPIES)
    left = [(episodes + i) // copies for i in range(copies)]
    generator = None if deterministic else torch.Generator().manual_seed(seed)
    returns, lengths = [], []
    envs = Environments(env_id, copies)
    try:
        envs.reset(seed=seed)
        while len(returns) < episodes:
            actions, _ = network.act(envs.observations, generator)
            for episode in envs.step(actions).episodes:
                if left[episode.env]:
                    left[episode.env] -= 1
                    returns.append(episode.total_reward)
                    lengths.append(episode.length)
    finally:
        envs.close()
    return {
        "mean_return": float(np.mean(returns)),
        "std_return": float(np.std(returns)),
        "mean_length": float(np.mean(lengths)),
    }
