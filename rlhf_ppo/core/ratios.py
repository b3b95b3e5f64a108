"""Probability ratios new / old: per action, or pooled over a turn or a sequence; importance weights of samplers."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.core.config import RATIO_LEVELS, WEIGHT_LEVELS, WEIGHT_MODES
from rlhf_ppo.core.kl import MAX_LOG_RATIO
from rlhf_ppo.core.masked import keep
from rlhf_ppo.core.types import compute_dtype, require_bool, require_same_shape, result_dtype


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Compute ``pi_new / pi_old`` [*]; the log-ratio is clamped to +-20, so that the ratio stays finite."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def pool_old_logprobs(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, level: str = "token", turns: Tensor | None = None
) -> Tensor:
    """Shift old log-probs so that all actions of a turn or sequence share one log-ratio, the mean of theirs.

    ``logprobs - pool_old_logprobs(...)`` is that mean in value, while its gradient stays each action's own. So every
    action keeps its own advantage; where the advantages of a sequence are equal, loss, clipping and gradient are those
    of the sequence-level surrogate (under ``sequence_mean`` aggregation, exactly GSPO's).

    Args:
        logprobs: [B, ..., T] current log-probs.
        old_logprobs: likewise, log-probs at rollout.
        mask: likewise, bool; only True actions are pooled.
        level: token (nothing is pooled), turn or sequence; sequences are the rows of axis 0.
        turns: likewise, long: the index, 0 to T - 1, of each action's turn; read for level turn alone.
    Returns:
        The shape of ``logprobs``, without gradients, in float32 or wider; 0 outside ``mask``.
    Raises:
        ValueError: shapes differ, the level is unknown, there are no rows to pool over, turns are missing or (on CPU)
            an index is out of range.
    Source: Zheng et al., "Group Sequence Policy Optimization" (2025), equations 7 and 13 (GSPO-token).
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask, turns=turns)
    require_bool(mask=mask)
    if level not in RATIO_LEVELS:
        raise ValueError(f"unknown ratio level {level!r}; known: {', '.join(RATIO_LEVELS)}")
    dtype = compute_dtype(logprobs)
    old = keep(old_logprobs, mask).detach().to(dtype)
    if level == "token":
        return old
    if logprobs.ndim < 2:
        raise ValueError(f"ratio_level={level!r} needs rows: log-probs must be [B, T], got {tuple(logprobs.shape)}")
    new = keep(logprobs, mask).detach().to(dtype)
    own, real = (new - old).flatten(1), mask.flatten(1)
    if level == "sequence":
        pooled = own.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)
    else:
        if turns is None:
            raise ValueError("ratio_level='turn' needs turns, the index of each action's turn (Experience.turns)")
        turn = keep(turns, mask).flatten(1)
        _check_turns(turn)
        sums, sizes = (torch.zeros_like(x).scatter_add_(1, turn, x) for x in (own, real.to(dtype)))
        pooled = (sums / sizes.clamp(min=1)).gather(1, turn)
    return keep(new - pooled.expand_as(own).view_as(new), mask)


def _check_turns(turn: Tensor) -> None:
    # On a GPU this check would synchronise at every call.
    if turn.device.type == "cpu" and turn.numel() and not (int(turn.min()) >= 0 and int(turn.max()) < turn.shape[1]):
        raise ValueError(f"turns must lie in [0, {turn.shape[1]}), got {int(turn.min())} to {int(turn.max())}")


def importance_weights(
    logprobs: Tensor,
    sampled_logprobs: Tensor,
    mask: Tensor,
    *,
    cap: float,
    level: str = "token",
    mode: str = "truncate",
) -> Tensor:
    """Compute weights ``pi_trainer / pi_sampler`` [*], which correct for a sampler whose distribution differs.

    Args:
        logprobs: [*] log-probs by the trainer's own forward pass, before any update.
        sampled_logprobs: [*] log-probs of the same actions as the sampler recorded them.
        mask: [*] bool, True on actions; the weight of others is 0.
        cap: largest weight, 1 or more; it bounds the variance at the price of a bias.
        level: token: each action's own ratio; sequence: the product of a row's ratios, for all of its actions (rows
            are those of axis 0).
        mode: what becomes of a weight above the cap: the cap (truncate), or 0 (mask), so that nothing is learned there.
    Raises:
        ValueError: shapes differ, the cap is below 1, the level or the mode is unknown, or there are no rows.
    Source: Ionides, "Truncated Importance Sampling" (2008); Espeholt et al., "IMPALA" (2018). Masking is common
        practice, from no single paper.
    """
    require_same_shape(logprobs=logprobs, sampled_logprobs=sampled_logprobs, mask=mask)
    require_bool(mask=mask)
    if not cap >= 1:
        raise ValueError(f"cap must be 1 or more, got {cap}: below 1 it would shrink every weight")
    for name, value, known in (("level", level, WEIGHT_LEVELS), ("mode", mode, WEIGHT_MODES)):
        if value not in known:
            raise ValueError(f"unknown {name} of importance weights {value!r}; known: {', '.join(known)}")
    dtype = compute_dtype(logprobs)
    own = keep(logprobs, mask).to(dtype) - keep(sampled_logprobs, mask).to(dtype)
    if level == "sequence":
        if logprobs.ndim < 2:
            raise ValueError(f"level='sequence' needs rows: log-probs must be [B, T], got {tuple(logprobs.shape)}")
        own = own.flatten(1).sum(dim=1).view(-1, *[1] * (logprobs.ndim - 1)).expand_as(own)
    weights = probability_ratio(own, torch.zeros_like(own))
    above = torch.full_like(weights, cap if mode == "truncate" else 0.0)
    return keep(torch.where(weights > cap, above, weights), mask).to(result_dtype(logprobs))


def truncated_importance_weights(logprobs: Tensor, sampled_logprobs: Tensor, *, cap: float) -> Tensor:
    """Compute ``min(pi_trainer / pi_sampler, cap)`` [*]: :func:`importance_weights` of tokens, everywhere.

    Args:
        logprobs: [*] log-probs by the trainer's own forward pass, before any update.
        sampled_logprobs: [*] log-probs of the same actions as the sampler recorded them.
        cap: largest weight, 1 or more; it bounds the variance at the price of a bias.
    Raises:
        ValueError: shapes differ, or the cap is below 1.
    Source: Ionides, "Truncated Importance Sampling" (2008); Espeholt et al., "IMPALA" (2018).
    """
    everywhere = torch.ones_like(logprobs, dtype=torch.bool)
    return importance_weights(logprobs, sampled_logprobs, everywhere, cap=cap)
