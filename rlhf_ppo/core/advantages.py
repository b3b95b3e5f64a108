"""Advantages: how much better an action turned out than the critic, or its siblings, expected."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.core.masked import EPS, keep, masked_mean
from rlhf_ppo.core.types import compute_dtype, require_bool, require_same_shape, result_dtype


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates (GAE).

    ``delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)`` and ``A_t = delta_t + gamma * lambda * A_{t+1}``, where
    ``terminated`` sets V(s_{t+1}) to 0 and both flags cut the sum. lambda = 0 is TD(0), lambda = 1 is Monte Carlo.

    Args:
        rewards: [B, T] reward of each step.
        values: [B, T] V(s_t).
        next_values: [B, T] V at the next decision, supplied by the caller; ignored where terminated.
        terminated: [B, T] bool, the episode ended: no future. Wins where both flags are set.
        truncated: [B, T] bool, the episode was cut: the future counts through next_values alone.
        gamma: discount, a float or a tensor that broadcasts to [B, T].
        gae_lambda: lambda, likewise.
        mask: [B, T] bool, True at real decisions; other steps are skipped.
    Returns:
        (advantages, returns), both [B, T], not normalised, 0 at masked steps; returns = advantages + values.
    Raises:
        ValueError: shapes differ or are not [B, T], or a flag is not bool.
    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2016),
    equation 16. The paper has no truncation; its treatment follows Pardo et al., "Time Limits in RL" (2018).
    """
    require_same_shape(
        rewards=rewards, values=values, next_values=next_values, terminated=terminated, truncated=truncated, mask=mask
    )
    require_bool(terminated=terminated, truncated=truncated)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [B, T] with time last, got {tuple(rewards.shape)}")
    if mask is None:
        mask = torch.ones_like(terminated)
    require_bool(mask=mask)

    dtype = compute_dtype(rewards)
    r, v = keep(rewards.to(dtype), mask), keep(values.to(dtype), mask)
    discount = keep(_per_step("gamma", gamma, r), mask)
    trace = keep(_per_step("gae_lambda", gae_lambda, r), mask) * discount
    v_next = keep(next_values.to(dtype), mask & ~terminated)
    delta = r + discount * v_next - v
    # A masked step passes on the advantage of the step after it unchanged: its delta is 0, its trace 1.
    trace = torch.where(mask, keep(trace, ~(terminated | truncated)), torch.ones_like(trace))

    advantage = torch.zeros_like(r[:, 0]) if r.shape[1] else r.sum(dim=1)
    columns: list[Tensor] = []
    for step_delta, step_trace in zip(reversed(delta.unbind(dim=1)), reversed(trace.unbind(dim=1)), strict=True):
        advantage = torch.addcmul(step_delta, step_trace, advantage)
        columns.append(advantage)
    advantages = keep(torch.stack(columns[::-1], dim=1), mask) if columns else r
    return advantages.to(result_dtype(rewards)), (advantages + v).to(result_dtype(rewards))


def _per_step(name: str, x: float | Tensor, like: Tensor) -> Tensor:
    x = torch.as_tensor(x, dtype=like.dtype, device=like.device)
    try:
        return x.expand_as(like)
    except RuntimeError:
        raise ValueError(f"{name} {tuple(x.shape)} does not broadcast to [B, T] {tuple(like.shape)}") from None


def leave_one_out_advantages(scores: Tensor, group_size: int, *, mask: Tensor | None = None) -> Tensor:
    """Compute RLOO's advantages: each score minus the mean score of the other responses to the same prompt.

    Args:
        scores: [B] scores; the ``group_size`` responses to one prompt are adjacent.
        group_size: responses per prompt, at least 2.
        mask: [B] bool, False where a response has no score; its group is then smaller.
    Returns:
        [B] advantages; 0 without a score, or without another score in the group.
    Raises:
        ValueError: scores are not [B], B is not a multiple of group_size, or the mask does not fit.
    Source: Ahmadian et al., "Back to Basics" (2024); Kool et al., "Buy 4 REINFORCE Samples" (2019).
    """
    grouped, real = _groups(scores, group_size, mask)
    siblings = real.sum(dim=1, keepdim=True) - 1
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / siblings.clamp(min=1)
    return keep(grouped - others, real & (siblings > 0)).flatten().to(result_dtype(scores))


def group_normalized_advantages(
    scores: Tensor, group_size: int, scale_by_std: bool = True, *, mask: Tensor | None = None
) -> Tensor:
    """Compute GRPO's advantages: each score minus its group's mean, over the group's population standard deviation.

    Args:
        scores: [B] scores; the ``group_size`` responses to one prompt are adjacent.
        group_size: responses per prompt, at least 2.
        scale_by_std: False subtracts the mean only (Dr. GRPO).
        mask: [B] bool, False where a response has no score; its group is then smaller.
    Returns:
        [B] advantages; 0 in a group of equal scores, and without a score.
    Raises:
        ValueError: scores are not [B], B is not a multiple of group_size, or the mask does not fit.
    Source: Shao et al., "DeepSeekMath" (2024), section 4.1; Liu et al., "Understanding R1-Zero-Like Training" (2025).
    """
    grouped, real = _groups(scores, group_size, mask)
    centred = grouped - masked_mean(grouped, real, dim=1)[:, None]
    centred = centred - masked_mean(centred, real, dim=1)[:, None]  # removes what rounding left of the mean
    if scale_by_std:
        centred = centred * torch.rsqrt(masked_mean(centred.square(), real, dim=1)[:, None] + EPS)
    return keep(centred, real).flatten().to(result_dtype(scores))


def _groups(scores: Tensor, group_size: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Reshape scores (0 where masked) and mask to [B / group_size, group_size]."""
    if scores.ndim != 1:
        raise ValueError(f"scores must be [B], one per response, got {tuple(scores.shape)}")
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}: one response has nothing to compare with")
    if scores.shape[0] % group_size:
        raise ValueError(f"{scores.shape[0]} scores do not divide into groups of group_size={group_size}")
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    require_same_shape(mask=mask, scores=scores)
    require_bool(mask=mask)
    grouped = keep(scores.to(compute_dtype(scores)), mask)
    return grouped.reshape(-1, group_size), mask.reshape(-1, group_size)
