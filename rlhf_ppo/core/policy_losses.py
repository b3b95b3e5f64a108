"""Policy losses per action: PPO's clipped surrogate, its relatives, plain policy gradients, and the KL as a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.core.config import OBJECTIVES, PPOConfig
from rlhf_ppo.core.kl import kl_estimate
from rlhf_ppo.core.ratios import probability_ratio
from rlhf_ppo.core.types import compute_dtype, require_same_shape, result_dtype


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Compute PPO's clipped surrogate, negated: ``max(-r * A, -clip(r, 1 - eps, 1 + eps_high) * A)``, r = new / old.

    Only two cases lose their gradient: A > 0 with r > 1 + eps_high, and A < 0 with r < 1 - eps.

    Args:
        logprobs: [*] current log-probs, with gradients.
        old_logprobs: [*] log-probs at rollout.
        advantages: [*] advantages.
        clip_range: eps.
        clip_range_high: upper eps when it differs ("clip-higher").
        dual_clip: c > 1: where A < 0 the loss is at most -c * A.
    Returns:
        [*] loss per action, to be minimised.
    Raises:
        ValueError: shapes differ, or a range is out of bounds.
    Source: Schulman et al. (2017), equation 7; Ye et al., "Mastering Complex Control in MOBA Games" (2020), equation 6.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    high = clip_range if clip_range_high is None else clip_range_high
    if clip_range < 0 or high < 0:
        raise ValueError(f"clip ranges must not be negative, got clip_range={clip_range}, clip_range_high={high}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    dtype = compute_dtype(logprobs)
    a = advantages.to(dtype)
    ratio = probability_ratio(logprobs.to(dtype), old_logprobs.to(dtype))
    loss = torch.maximum(-ratio * a, -ratio.clamp(1 - clip_range, 1 + high) * a)
    if dual_clip is not None:
        loss = torch.where(a < 0, torch.minimum(loss, -dual_clip * a), loss)
    return loss.to(result_dtype(logprobs))


def cispo_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_range_high: float) -> Tensor:
    """Compute CISPO's objective, negated: ``-sg(min(r, 1 + eps_high)) * A * log pi``.

    The ratio is a capped weight without a gradient. Every action keeps its gradient, where the clipped surrogate drops
    those it clips. There is no lower bound: raising a small ratio to 1 - eps would overweight the very actions that the
    policy has left, and the paper sets none.

    Shapes and errors are those of :func:`clipped_policy_loss`. Source: MiniMax, "MiniMax-M1" (2025), equations 4 and 5.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if clip_range_high < 0:
        raise ValueError(f"clip_range_high must not be negative, got {clip_range_high}")
    dtype = compute_dtype(logprobs)
    new = logprobs.to(dtype)
    weight = probability_ratio(new, old_logprobs.to(dtype)).clamp(max=1 + clip_range_high).detach()
    return (-weight * advantages.to(dtype) * new).to(result_dtype(logprobs))


def dis_policy_loss(
    logprobs: Tensor,
    sampled_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
) -> Tensor:
    """Compute direct double-sided importance sampling, negated: ``-sg(f(r)) * A * log pi``, r = new / sampler's.

    f(r) is r where 1 - eps < r < 1 + eps_high and 0 elsewhere, whatever the sign of A: an action that the policy has
    moved away from, to either side, is masked. Its ratio is to the log-probs that the *sampler* recorded, so that one
    weight corrects both for the steps since sampling and for a sampler that computes otherwise than the trainer. The
    paper leaves open whether r carries a gradient; as in IcePop and CISPO it is a weight here.

    Args:
        logprobs: [*] current log-probs, with gradients.
        sampled_logprobs: [*] log-probs of the same actions as the sampler recorded them.
        advantages: [*] advantages.
        clip_range: eps.
        clip_range_high: upper eps when it differs.
    Returns:
        [*] loss per action, to be minimised; 0, without a gradient, where masked.
    Raises:
        ValueError: shapes differ, or a range is negative.
    Source: Hou et al., "Single-Rollout Asynchronous Optimization" (SAO, 2026), equations 1 to 3.
    """
    require_same_shape(logprobs=logprobs, sampled_logprobs=sampled_logprobs, advantages=advantages)
    high = clip_range if clip_range_high is None else clip_range_high
    if clip_range < 0 or high < 0:
        raise ValueError(f"clip ranges must not be negative, got clip_range={clip_range}, clip_range_high={high}")
    dtype = compute_dtype(logprobs)
    new = logprobs.to(dtype)
    ratio = probability_ratio(new, sampled_logprobs.to(dtype)).detach()
    weight = torch.where((ratio > 1 - clip_range) & (ratio < 1 + high), ratio, torch.zeros_like(ratio))
    return (-weight * advantages.to(dtype) * new).to(result_dtype(logprobs))


def penalty_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    """Compute PPO-Penalty's objective, negated: ``-r * A + beta * KL(old || new)``.

    The KL is estimated from the old policy's own actions by ``(r - 1) - log r``, which is never negative and whose
    gradient is unbiased here, because the actions were drawn from the fixed old policy.

    Shapes and errors are those of :func:`clipped_policy_loss`. Source: Schulman et al. (2017), equation 8.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    dtype = compute_dtype(logprobs)
    new, old = logprobs.to(dtype), old_logprobs.to(dtype)
    loss = -probability_ratio(new, old) * advantages.to(dtype) + beta * kl_estimate(old, new, "k3")
    return loss.to(result_dtype(logprobs))


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Compute ``-log pi(a|s) * A`` per action [*]: A2C's loss, and REINFORCE's when A is the Monte Carlo return.

    Source: Williams (1992); Mnih et al., "Asynchronous Methods for Deep Reinforcement Learning" (2016).
    """
    require_same_shape(logprobs=logprobs, advantages=advantages)
    dtype = compute_dtype(logprobs)
    return (-logprobs.to(dtype) * advantages.to(dtype)).to(result_dtype(logprobs))


def k2_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Compute ``sg(r) * 0.5 * (log pi - log pi_ref)^2`` per action [*].

    In expectation its gradient is that of KL(pi || pi_ref).

    The actions were drawn from the old policy; r = new / old makes the expectation the current one's. At the first step
    of an update r is 1. As losses, k1 has no gradient in expectation, and k3 that of the reverse KL.

    Shapes and errors are those of :func:`clipped_policy_loss`. Source: Tang and Munos, "On a few pitfalls in KL
    divergence gradient estimation for RL" (2025).
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    dtype = compute_dtype(logprobs)
    ratio = probability_ratio(logprobs.to(dtype), old_logprobs.to(dtype)).detach()
    return (ratio * kl_estimate(logprobs.to(dtype), ref_logprobs.to(dtype), "k2")).to(result_dtype(logprobs))


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, config: PPOConfig) -> Tensor:
    """Compute the loss [*] of ``config.objective``; ``old_logprobs`` are the sampler's own under dis.

    Raises:
        ValueError: the objective is unknown, or one of its arguments is wrong.
    """
    if config.objective in ("clip", "adaptive_clip", "dual_clip"):
        return clipped_policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip if config.objective == "dual_clip" else None,
        )
    if config.objective == "cispo":
        high = config.clip_range if config.clip_range_high is None else config.clip_range_high
        return cispo_policy_loss(logprobs, old_logprobs, advantages, clip_range_high=high)
    if config.objective == "dis":
        return dis_policy_loss(
            logprobs, old_logprobs, advantages, clip_range=config.clip_range, clip_range_high=config.clip_range_high
        )
    if config.objective == "penalty":
        return penalty_policy_loss(logprobs, old_logprobs, advantages, beta=config.penalty_beta)
    if config.objective in ("a2c", "reinforce"):
        return policy_gradient_loss(logprobs, advantages)
    raise ValueError(f"unknown objective {config.objective!r}; known: {', '.join(OBJECTIVES)}")
