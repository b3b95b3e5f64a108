"""Estimate advantages: GAE that bootstraps where an episode was truncated and not where it terminated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from classic.networks.actor_critic import ActorCritic
from classic.rollout import Rollout
from rlhf_ppo.core import Experience, PPOConfig, compute_gae, masked_whiten


@torch.no_grad()
def critic_values(network: ActorCritic, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Compute V(s_t) and V of the observation that really followed, both [B, T], in one forward pass of the critic.

    Under NEXT_STEP an episode's last observation is the one after its last step in ``observations``. Under SAME_STEP
    that place already holds the new episode's first one, so the recorded last observation is evaluated instead.
    """
    grid_shape = rollout.observations.shape[:2]
    if rollout.state is None:
        everything = torch.cat([rollout.observations.flatten(0, 1), rollout.final_observations])
        values = network.values(everything)
        grid, finals = values[: grid_shape.numel()].unflatten(0, grid_shape), values[grid_shape.numel() :]
    else:
        grid = network.values(rollout.observations, rollout.starts, rollout.state)
        last = rollout.final_observations.unsqueeze(1)
        never = torch.zeros(last.shape[:2], dtype=torch.bool)
        finals = network.values(last, never, rollout.final_state).squeeze(1) if len(last) else grid[:0, 0]
    next_values = grid[:, 1:].clone()
    next_values[rollout.final_index] = finals
    return grid[:, :-1], next_values


class Estimate(NamedTuple):
    """The critic's estimates for a rollout, each [B, T]; nothing is whitened."""

    values: Tensor
    """V(s_t)."""
    next_values: Tensor
    """V of the observation that really followed."""
    advantages: Tensor
    """GAE, or the returns under reinforce."""
    returns: Tensor
    """The critic's targets."""


def estimate_advantages(network: ActorCritic, rollout: Rollout, config: PPOConfig) -> Estimate:
    """Estimate values, advantages and returns of a rollout with the current critic.

    A terminated step has no value after it; at a truncated one the value of the episode's last observation counts.
    """
    values, next_values = critic_values(network, rollout)
    advantages, returns = compute_gae(
        rollout.rewards,
        values,
        next_values,
        rollout.terminated,
        rollout.truncated,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        mask=rollout.mask,
    )
    if config.objective == "reinforce":
        # Monte Carlo returns without a baseline; the critic stands in for what the rollout's end cut off.
        advantages = returns
    return Estimate(values, next_values, advantages, returns)


def to_experience(rollout: Rollout, estimate: Estimate, config: PPOConfig) -> Experience:
    """Return what an update learns from, in minibatch rows: whitened advantages, returns on the critic's scale."""
    values, _, advantages, returns = estimate
    weights = masked_whiten(advantages, rollout.mask) if config.normalize_advantages else advantages
    return Experience(*map(rollout.rows, (rollout.logprobs, values, weights, returns, rollout.mask)))
