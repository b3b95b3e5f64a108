"""DPO: a pairwise loss that learns from preferences without a reward model or sampling."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ppo.core.types import compute_dtype, require_same_shape, result_dtype


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1
) -> Tensor:
    """Compute ``-log sigmoid(beta * ((log pi/ref)(chosen) - (log pi/ref)(rejected)))`` per pair.

    ``beta * log pi/ref`` is the reward for which the policy would be the KL-regularised optimum; the loss is
    Bradley-Terry's on the difference of these rewards.

    Args:
        policy_chosen, policy_rejected: [B] current log-probs of whole responses (summed over tokens), with gradients.
        ref_chosen, ref_rejected: [B] the same under the frozen reference.
        beta: weight of the KL to the reference that the optimum balances, above 0.
    Returns:
        [B] loss per pair; log 2 where policy and reference agree.
    Raises:
        ValueError: shapes differ, or beta is not positive.
    Source: Rafailov et al., "Direct Preference Optimization" (2023), equation 7.
    """
    require_same_shape(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    dtype = compute_dtype(policy_chosen)
    chosen = policy_chosen.to(dtype) - ref_chosen.to(dtype)
    rejected = policy_rejected.to(dtype) - ref_rejected.to(dtype)
    return -logsigmoid(beta * (chosen - rejected)).to(result_dtype(policy_chosen))
