"""Losses: the value loss, how losses per action are aggregated, and the sum of all of them as one scalar."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.core.config import AGGREGATIONS, PPOConfig
from rlhf_ppo.core.masked import keep
from rlhf_ppo.core.policy_losses import k2_loss, policy_loss
from rlhf_ppo.core.ratios import pool_old_logprobs
from rlhf_ppo.core.types import (
    Experience,
    PolicyOutput,
    PPOLoss,
    compute_dtype,
    require_bool,
    require_same_shape,
    result_dtype,
)


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
    new: PolicyOutput,
    old: Experience,
    config: PPOConfig,
    *,
    denominator: float | Tensor | None = None,
    positive_denominator: float | Tensor | None = None,
) -> PPOLoss:
    """Compute ``policy + vf_coef * value - ent_coef * entropy + kl_loss_coef * kl + positive_loss_coef * positive``.

    Args:
        new: the current policy on the recorded actions, [*].
        old: the recorded facts, [*]; nothing outside ``old.mask`` is read.
        config: objective, clip ranges, coefficients and loss aggregation.
        denominator: see :func:`aggregate_loss`.
        positive_denominator: likewise, of the mask ``old.mask & old.positive``.
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
        sampled_logprobs=old.sampled_logprobs,
        positive=old.positive,
        mask=old.mask,
    )
    require_bool(mask=old.mask)
    mask = old.mask

    def aggregate(loss: Tensor) -> Tensor:
        return aggregate_loss(loss, mask, config.loss_aggregation, denominator=denominator)

    # Masked inputs are replaced before anything is computed: where() on results would still back-propagate their NaN.
    logprobs, old_logprobs, advantages = (keep(x, mask) for x in (new.logprobs, old.logprobs, old.advantages))
    weights = None if old.weights is None else keep(old.weights, mask)
    compared = keep(old.compared_logprobs(config), mask)
    pooled = pool_old_logprobs(logprobs, compared, mask, level=config.ratio_level, turns=old.turns)
    policy = aggregate(_weighted(policy_loss(logprobs, pooled, advantages, config), weights))
    value = entropy = kl = positive = torch.zeros_like(policy)
    if new.values is not None and config.objective != "reinforce":
        value = aggregate(_value_loss(new.values, old, config))
    if new.entropy is not None:
        entropy = aggregate(keep(new.entropy, mask))
    elif config.ent_coef != 0:
        raise ValueError(f"ent_coef={config.ent_coef} needs new.entropy, which is None")
    if config.kl_loss_coef != 0:
        kl = aggregate(_kl_loss(new, old, logprobs, old_logprobs, weights, config))
    if config.positive_loss_coef != 0:
        if denominator is not None and positive_denominator is None:
            raise ValueError("denominator is given, positive_denominator is not: parts would not sum to the whole")
        examples = _positive_actions(old, config)
        positive = aggregate_loss(-logprobs, examples, config.loss_aggregation, denominator=positive_denominator)
    total = policy + config.vf_coef * value - config.ent_coef * entropy + config.kl_loss_coef * kl
    if config.positive_loss_coef != 0:
        total = total + config.positive_loss_coef * positive
    return PPOLoss(total=total, policy=policy, value=value, entropy=entropy, kl=kl, positive=positive)


def _value_loss(values: Tensor, old: Experience, config: PPOConfig) -> Tensor:
    if old.returns is None:
        raise ValueError("new.values are given but old.returns is None: the critic has nothing to learn from")
    old_values, returns = None if old.values is None else keep(old.values, old.mask), keep(old.returns, old.mask)
    return clipped_value_loss(keep(values, old.mask), old_values, returns, clip_range=config.clip_range_vf)


def _kl_loss(
    new: PolicyOutput,
    old: Experience,
    logprobs: Tensor,
    old_logprobs: Tensor,
    weights: Tensor | None,
    config: PPOConfig,
) -> Tensor:
    if config.kl_loss == "exact":
        if new.kl is None:
            raise ValueError(f"kl_loss='exact' with kl_loss_coef={config.kl_loss_coef} needs new.kl, which is None")
        return keep(new.kl, old.mask)
    if old.ref_logprobs is None:
        raise ValueError(f"kl_loss_coef={config.kl_loss_coef} needs old.ref_logprobs, which is None")
    return _weighted(k2_loss(logprobs, old_logprobs, keep(old.ref_logprobs, old.mask)), weights)


def _positive_actions(old: Experience, config: PPOConfig) -> Tensor:
    if old.positive is None:
        raise ValueError(f"positive_loss_coef={config.positive_loss_coef} needs old.positive, which is None")
    require_bool(positive=old.positive)
    return old.mask & old.positive


def _weighted(loss: Tensor, weights: Tensor | None) -> Tensor:
    return loss if weights is None else loss * weights.to(loss.dtype)
