"""Explain a rollout step by step: reward, value, advantage and ratio of every decision."""

from __future__ import annotations

import torch
from torch import Tensor

from classic.advantages import Estimate, trained_advantages
from classic.networks.actor_critic import ActorCritic
from classic.rollout import Rollout
from rlhf_ppo.core import Experience, PPOConfig
from rlhf_ppo.runtime.explain import Explanation, explain_actions


@torch.no_grad()
def explain_rollout(network: ActorCritic, rollout: Rollout, estimate: Estimate, config: PPOConfig) -> Explanation:
    """Explain every decision of a rollout, with its update's estimates and settings and the current policy."""
    mask = rollout.mask
    trained = trained_advantages(estimate, mask, config).to(rollout.logprobs.dtype)
    now = network.evaluate(rollout.decisions()).logprobs.cpu()
    if rollout.state is None:  # rows of unmasked steps only
        now = torch.zeros_like(rollout.logprobs).masked_scatter(mask, now)
    return explain_actions(
        rewards=rollout.rewards,
        values=estimate.values,
        next_values=estimate.next_values,
        terminated=rollout.terminated,
        truncated=rollout.truncated,
        advantages=estimate.advantages,
        old=Experience(rollout.logprobs, None, trained, None, mask),
        new_logprobs=now,
        config=config,
        gamma=config.gamma,
        labels=[[_label(action) for action in row] for row in rollout.actions],
    )


def _label(action: Tensor) -> str:
    numbers = action.flatten().tolist()
    return ",".join(f"{number:.2f}" if isinstance(number, float) else str(number) for number in numbers)
