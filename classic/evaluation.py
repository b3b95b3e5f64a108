"""Evaluation: whole episodes, shared out so that short ones do not count twice, and bounded so that it ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from classic.envs.environments import Environments, Episode
from classic.envs.seeds import derive_seeds
from classic.networks.actor_critic import ActorCritic
from rlhf_ppo.runtime.signals import stop_if_asked

MAX_COPIES = 32
MAX_STEPS = 10_000
"""Steps of an episode where neither the environment nor a setting limits them."""


def evaluate_policy(
    envs: Environments,
    network: ActorCritic,
    episodes: int,
    *,
    deterministic: bool,
    seed: int,
    view: Callable[[Tensor], Tensor],
    max_steps: int,
) -> dict[str, float]:
    """Mean and spread of the undiscounted return over ``episodes`` episodes.

    Each copy plays a share fixed beforehand. Taking the first episodes to finish anywhere would favour short ones. A
    copy whose episode is cut waits until all that still owe episodes do; then all begin anew.

    Args:
        envs: at most as many copies as episodes.
        network: the policy.
        episodes: how many.
        deterministic: take the most likely action instead of a sampled one.
        seed: of the environments and the draws.
        view: what the network sees of observations (their normalised form, with the statistics as they are).
        max_steps: steps after which an episode is cut; what it has brought by then counts.
    Returns:
        mean_return, std_return (population) and mean_length in steps.
    Warns:
        UserWarning: episodes were cut.
    Raises:
        BrokenEnvironmentError: see :class:`Environments`.
        Interrupted: a signal came while a run listens for them.
    """
    generator = None if deterministic else torch.Generator().manual_seed(derive_seeds(seed, "prediction", 1)[0])
    owed = np.array([(episodes + i) // envs.num_envs for i in range(envs.num_envs)])
    playing = np.zeros(envs.num_envs, dtype=bool)
    finished: list[Episode] = []
    beginnings = cut = 0
    state = None
    while owed.any():
        if not (playing & (owed > 0)).any():
            envs.reset(seed, "evaluation", begun=beginnings)
            state = network.initial_state(envs.num_envs)
            playing[:] = True
            beginnings += 1
        stop_if_asked()
        actions, _, state = network.act(
            view(envs.observations), generator, action_masks=envs.action_masks, starts=envs.starting, state=state
        )
        over = [episode for episode in envs.step(actions).episodes if playing[episode.env]]
        too_long = np.flatnonzero(playing & (envs.lengths >= max_steps))
        cut += int((owed[too_long] > 0).sum())
        playing[too_long] = False
        for episode in [*over, *map(envs.running_episode, too_long.tolist())]:
            if owed[episode.env]:
                owed[episode.env] -= 1
                finished.append(episode)
    if cut:
        warn_of_cut(envs, cut, episodes, max_steps)
    returns = [episode.total_reward for episode in finished]
    return {
        "mean_return": float(np.mean(returns)),
        "std_return": float(np.std(returns)),
        "mean_length": float(np.mean([episode.length for episode in finished])),
    }


def warn_of_cut(envs: Environments, cut: int, episodes: int, max_steps: int) -> None:
    """Say which limit was missing, and which one was reached instead."""
    limit = envs.time_limit()
    own = "has no time limit of its own (max_episode_steps)" if limit is None else f"has its own at {limit:,} steps"
    warnings.warn(
        f"{cut} of {episodes} episodes were cut after {max_steps:,} steps (eval_max_steps) and count as they were by "
        f"then: environment {envs.env_id!r} {own}",
        stacklevel=4,
    )
