"""Estimate advantages: GAE that bootstraps where an episode was truncated and not where it terminated.

The critic may predict in other units than the reward's (``ValueScale``). Estimates are in the reward's, and what an
update learns from is in the critic's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from classic.networks.actor_critic import ActorCritic
from classic.rollout import Rollout
from rlhf_ppo.core import (
    Experience,
    PPOConfig,
    ValueScale,
    compute_gae,
    masked_mean,
    masked_var,
    masked_whiten,
    update_value_scale,
)

ROUNDING = 1e-12
"""Returns that differ by no more than this share of the largest are equal: what is left is float64's rounding."""


@torch.no_grad()
def critic_values(network: ActorCritic, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Compute V(s_t) and V of the observation that really followed, both [B, T], in one forward pass of the critic.

    They are in the critic's own units.

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
    """The critic's estimates for a rollout, each [B, T] in the reward's units; nothing is whitened."""

    values: Tensor
    """V(s_t)."""
    next_values: Tensor
    """V of the observation that really followed."""
    advantages: Tensor
    """GAE, or the returns under reinforce."""
    returns: Tensor
    """The critic's targets."""
    value_scale: ValueScale
    """The units in which the critic predicted."""


def estimate_advantages(
    network: ActorCritic, rollout: Rollout, config: PPOConfig, scale: ValueScale | None
) -> Estimate:
    """Estimate values, advantages and returns of a rollout with the current critic.

    A terminated step has no value after it; at a truncated one the value of the episode's last observation counts.

    Args:
        scale: the units in which the critic predicts; None: it is fresh, and whatever it predicts counts in those of
            this rollout's returns.
    """
    values, next_values = critic_values(network, rollout)
    scale = scale or first_value_scale(rollout, config.gamma)
    if scale != ValueScale():
        # In float64, where a large mean leaves room for small differences.
        values, next_values = scale.denormalize(values.double()), scale.denormalize(next_values.double())
    advantages, returns = compute_gae(
        rollout.rewards.to(values.dtype),
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
    return Estimate(values, next_values, advantages, returns, scale)


def first_value_scale(rollout: Rollout, gamma: float) -> ValueScale:
    """Return the mean and spread of a rollout's discounted rewards-to-go, as units for a critic that has learned none.

    What follows where an episode is cut is unknown, and the mean itself stands in for it: with R the rewards up to the
    cut and k the discount there (0 if the episode terminates first), ``mean = E[R] / (1 - E[k])``. So an offset of
    every reward moves the mean by b / (1 - gamma), as it moves V, wherever no episode terminates. With gamma 1 nothing
    bounds that mean, and 0 stands in. If all returns are equal, the spread is 1 and the count 0: a unit for nothing.
    """
    rewards, mask = rollout.rewards.double(), rollout.mask
    none, cut = torch.zeros_like(rewards), rollout.truncated.clone()
    cut[:, -1] = True

    def to_go(rewards: Tensor, at_cut: Tensor) -> Tensor:
        ends = rollout.terminated, rollout.truncated
        return compute_gae(rewards, none, at_cut, *ends, gamma=gamma, gae_lambda=1.0, mask=mask)[1]

    earned, discount = to_go(rewards, none), to_go(none, cut.double())
    rest = float(masked_mean(earned, mask) / (1 - masked_mean(discount, mask))) if gamma < 1 else 0.0
    returns = earned + rest * discount
    if float(masked_var(returns, mask).sqrt()) <= ROUNDING * float(returns.abs().max()):
        return ValueScale(float(masked_mean(returns, mask)))
    return update_value_scale(None, returns, mask)


def to_experience(rollout: Rollout, estimate: Estimate, config: PPOConfig, scale: ValueScale | None) -> Experience:
    """Return what an update learns from, in minibatch rows: whitened advantages, returns in the critic's units.

    Args:
        scale: the critic's units from here on; None: those of the estimate.
    """
    scale = scale or estimate.value_scale
    values, weights, returns = (
        x.to(rollout.logprobs.dtype)
        for x in (
            scale.normalize(estimate.values),
            trained_advantages(estimate, rollout.mask, config),
            scale.normalize(estimate.returns),
        )
    )
    return Experience(*map(rollout.rows, (rollout.logprobs, values, weights, returns, rollout.mask)))


def trained_advantages(estimate: Estimate, mask: Tensor, config: PPOConfig) -> Tensor:
    """Return the advantages [B, T] as they weigh decisions: whitened, unless normalize_advantages is off."""
    if not config.normalize_advantages:
        return estimate.advantages
    # In units of the returns' spread, so that whitening's epsilon means the same for every reward.
    return masked_whiten(estimate.advantages / estimate.value_scale.std, mask)
