"""Losses: PPO's policy objectives, the value loss, and their sum as one scalar."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.core.config import AGGREGATIONS, OBJECTIVES, PPOConfig
from rlhf_ppo.core.kl import kl_estimate
from rlhf_ppo.core.masked import keep
from rlhf_ppo.core.ratios import pool_old_logprobs, probability_ratio
from rlhf_ppo.core.types import (
    Experience,
    PolicyOutput,
    PPOLoss,
    compute_dtype,
    require_bool,
    require_same_shape,
    result_dtype,
)


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


def clipped_value_loss(
    values: Tensor, old_values: Tensor | None, returns: Tensor, *, clip_range: float | None = None
) -> Tensor:
    """Compute ``0.5 * (V - R)^2``, or the larger of that and the same with V clipped to the old value +- clip_range.

    Args:
        values: [*] current V(s), with gradients.
        old_values: [*] V(s) at rollout; read only when clipping.
        returns: [*] targets on the scale of the rewards.
        clip_range: None: no clipping.
    Returns:
        [*] loss per state.
    Raises:
        ValueError: shapes differ, clip_range is negative, or clipping lacks old_values.
    Source: OpenAI baselines' ppo2. The paper has no value clipping.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    dtype = compute_dtype(values)
    v, target = values.to(dtype), returns.to(dtype)
    loss = 0.5 * (v - target).square()
    if clip_range is not None:
        if old_values is None or clip_range < 0:
            raise ValueError(
                f"value clipping needs old_values and a clip_range >= 0, got clip_range={clip_range}, "
                f"old_values={'None' if old_values is None else 'given'}"
            )
        old = old_values.to(dtype)
        clipped = old + (v - old).clamp(-clip_range, clip_range)
        loss = torch.maximum(loss, 0.5 * (clipped - target).square())
    return loss.to(result_dtype(values))


def aggregate_loss(
    loss: Tensor, mask: Tensor, mode: str = "token_mean", *, denominator: float | Tensor | None = None
) -> Tensor:
    """Aggregate per-action losses to one scalar.

    token_mean: sum over True entries / number of True entries.
    sequence_mean: mean over rows of each row's mean. sequence_sum: mean over rows of each row's sum.
    Rows without a True entry do not count.

    Args:
        loss: [*] per-action losses; [B, ..., T] for the sequence modes, whose rows are axis 0.
        mask: [*] bool.
        mode: token_mean, sequence_mean or sequence_sum.
        denominator: the whole minibatch's count over all microbatches and processes (True entries for token_mean,
            rows for sequence_*), so that the parts' losses sum to the loss of the whole; default: this call's own.
    Returns:
        [] the loss; 0 for an empty mask.
    Raises:
        ValueError: shapes differ, the mode is unknown, or a sequence mode gets less than two axes.
    """
    require_same_shape(mask=mask, loss=loss)
    require_bool(mask=mask)
    _check_mode(mode, loss)
    values = keep(loss.to(compute_dtype(loss)), mask)
    if mode == "token_mean":
        total = values.sum()
    else:
        rows, lengths = values.flatten(1).sum(dim=1), mask.flatten(1).sum(dim=1)
        total = (rows / lengths.clamp(min=1)).sum() if mode == "sequence_mean" else rows.sum()
    count = loss_denominator(mask, mode) if denominator is None else denominator
    if isinstance(count, Tensor):
        count = count.to(device=total.device, dtype=total.dtype)
        count = torch.where(count == 0, torch.ones_like(count), count)
    return (total / (1 if isinstance(count, (int, float)) and count == 0 else count)).to(result_dtype(loss))


def loss_denominator(mask: Tensor, mode: str = "token_mean") -> Tensor:
    """Return what :func:`aggregate_loss` divides by on the whole ``mask``: the number of True entries, or of rows.

    Pass it as ``denominator`` to the parts of a minibatch. Errors are those of :func:`aggregate_loss`.
    """
    require_bool(mask=mask)
    _check_mode(mode, mask)
    return mask.sum() if mode == "token_mean" else mask.flatten(1).any(dim=1).sum()


def _check_mode(mode: str, like: Tensor) -> None:
    if mode not in AGGREGATIONS:
        raise ValueError(f"unknown loss aggregation {mode!r}; known: {', '.join(AGGREGATIONS)}")
    if mode != "token_mean" and like.ndim < 2:
        raise ValueError(f"{mode} needs rows: the loss must be [B, T], got {tuple(like.shape)}")


def ppo_loss(
    new: PolicyOutput, old: Experience, config: PPOConfig, *, denominator: float | Tensor | None = None
) -> PPOLoss:
    """Compute the loss ``policy + vf_coef * value - ent_coef * entropy + kl_loss_coef * kl``.

    Args:
        new: the current policy on the recorded actions, [*].
        old: the recorded facts, [*]; nothing outside ``old.mask`` is read.
        config: objective, clip ranges, coefficients and loss aggregation.
        denominator: see :func:`aggregate_loss`.
    Raises:
        ValueError: shapes differ, the objective is unknown, or something that the config asks for is missing.
    """
    require_same_shape(
        logprobs=new.logprobs,
        values=new.values,
        entropy=new.entropy,
        kl=new.kl,
        old_logprobs=old.logprobs,
        old_values=old.values,
        advantages=old.advantages,
        returns=old.returns,
        weights=old.weights,
        ref_logprobs=old.ref_logprobs,
        turns=old.turns,
        mask=old.mask,
    )
    require_bool(mask=old.mask)
    mask = old.mask

    def aggregate(loss: Tensor) -> Tensor:
        return aggregate_loss(loss, mask, config.loss_aggregation, denominator=denominator)

    # Masked inputs are replaced before anything is computed: where() on results would still back-propagate their NaN.
    logprobs, old_logprobs, advantages = (keep(x, mask) for x in (new.logprobs, old.logprobs, old.advantages))
    weights = None if old.weights is None else keep(old.weights, mask)
    pooled = pool_old_logprobs(logprobs, old_logprobs, mask, level=config.ratio_level, turns=old.turns)
    policy = aggregate(_weighted(_policy_loss(logprobs, pooled, advantages, config), weights))
    value = entropy = kl = torch.zeros_like(policy)
    if new.values is not None and config.objective != "reinforce":
        if old.returns is None:
            raise ValueError("new.values are given but old.returns is None: the critic has nothing to learn from")
        old_values = None if old.values is None else keep(old.values, mask)
        value = aggregate(
            clipped_value_loss(
                keep(new.values, mask), old_values, keep(old.returns, mask), clip_range=config.clip_range_vf
            )
        )
    if new.entropy is not None:
        entropy = aggregate(keep(new.entropy, mask))
    elif config.ent_coef != 0:
        raise ValueError(f"ent_coef={config.ent_coef} needs new.entropy, which is None")
    if config.kl_loss_coef != 0:
        if config.kl_loss == "exact":
            if new.kl is None:
                raise ValueError(f"kl_loss='exact' with kl_loss_coef={config.kl_loss_coef} needs new.kl, which is None")
            kl = aggregate(keep(new.kl, mask))
        else:
            if old.ref_logprobs is None:
                raise ValueError(f"kl_loss_coef={config.kl_loss_coef} needs old.ref_logprobs, which is None")
            per_action = k2_loss(logprobs, old_logprobs, keep(old.ref_logprobs, mask))
            kl = aggregate(_weighted(per_action, weights))
    total = policy + config.vf_coef * value - config.ent_coef * entropy + config.kl_loss_coef * kl
    return PPOLoss(total=total, policy=policy, value=value, entropy=entropy, kl=kl)


def _weighted(loss: Tensor, weights: Tensor | None) -> Tensor:
    return loss if weights is None else loss * weights.to(loss.dtype)


def _policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, config: PPOConfig) -> Tensor:
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
    if config.objective == "penalty":
        return penalty_policy_loss(logprobs, old_logprobs, advantages, beta=config.penalty_beta)
    if config.objective in ("a2c", "reinforce"):
        return policy_gradient_loss(logprobs, advantages)
    raise ValueError(f"unknown objective {config.objective!r}; known: {', '.join(OBJECTIVES)}")
