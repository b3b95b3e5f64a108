"""A rollout of environment steps, step by step: what each earned, was believed to be worth, and taught."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from classic.rollout import Estimate, Rollout
from rlhf_ppo.core import Experience, PPOConfig, masked_whiten
from rlhf_ppo.runtime.explain import Explanation, explain_actions

if TYPE_CHECKING:
    from classic.ppo import PPO


@torch.no_grad()
def explain_rollout(agent: PPO, rollout: Rollout, estimate: Estimate, config: PPOConfig) -> Explanation:
    """Every decision of a rollout, with the estimates and the settings of its update, and the policy as it is now."""
    mask = rollout.mask
    advantages = estimate.advantages
    whitened = masked_whiten(advantages, mask) if config.normalize_advantages else advantages
    now = agent.network.evaluate(rollout.decisions()).logprobs
    if rollout.state is None:  # rows of real decisions alone
        now = torch.zeros_like(rollout.logprobs).masked_scatter(mask, now)
    return explain_actions(
        rewards=rollout.rewards,
        values=estimate.values,
        next_values=estimate.next_values,
        terminated=rollout.terminated,
        truncated=rollout.truncated,
        advantages=advantages,
        old=Experience(rollout.logprobs, None, whitened, None, mask),
        new_logprobs=now,
        config=config,
        gamma=config.gamma,
        labels=[[_label(action) for action in row] for row in rollout.actions],
    )


def _label(action: Tensor) -> str:
    numbers = action.flatten().tolist()
    return ",".join(f"{number:.2f}" if isinstance(number, float) else str(number) for number in numbers)
