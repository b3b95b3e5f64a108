"""Analytic gradients of the clipped surrogate and the value loss with respect to log-probs and values.

For small networks autograd costs more than the arithmetic. These are the derivatives of
:func:`~rlhf_ppo.core.losses.clipped_policy_loss` and :func:`~rlhf_ppo.core.losses.clipped_value_loss`, and tests hold
them to that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_ppo.core.kl import MAX_LOG_RATIO


def clipped_policy_slope(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Compute d loss / d log pi per action [*]: ``-r * A`` where the clip leaves a gradient, else 0; checks nothing.

    The sign of A says which log-ratios those are: up to log(1 + eps_high) for A > 0; from log(1 - eps) on for A < 0,
    and then with dual_clip c up to log c.

    Args: those of :func:`~rlhf_ppo.core.losses.clipped_policy_loss`, float32 or float64, without a graph.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    gain = advantages > 0
    lowest = math.log(1 - clip_range) if clip_range < 1 else -MAX_LOG_RATIO
    highest = MAX_LOG_RATIO if dual_clip is None else min(math.log(dual_clip), MAX_LOG_RATIO)
    log_ratio = logprobs - old_logprobs
    # Of two plain numbers where() would make torch's default format.
    low = torch.where(gain, log_ratio.new_full((), -MAX_LOG_RATIO), max(lowest, -MAX_LOG_RATIO))
    up = torch.where(gain, log_ratio.new_full((), min(math.log1p(high), MAX_LOG_RATIO)), highest)
    bounded = torch.clamp(log_ratio, low, up)
    alive = bounded == log_ratio
    # Times 0 rather than set to 0: a NaN has to stay one.
    return bounded.exp_().mul_(advantages).mul_(alive).neg_()


def clipped_value_slope(
    values: Tensor, old_values: Tensor | None, returns: Tensor, *, clip_range: float | None = None
) -> Tensor:
    """Compute d loss / d V per state [*]: ``V - R``, or 0 where clipping removes the gradient; checks nothing.

    Args: those of :func:`~rlhf_ppo.core.losses.clipped_value_loss`, float32 or float64, without a graph.
    """
    error = values - returns
    if clip_range is None or old_values is None:
        return error
    moved = values - old_values
    kept = moved.clamp(-clip_range, clip_range)
    # Beyond the range the clipped loss is a constant; it counts where it is the larger one.
    alive = (kept == moved) | (error.abs() >= (old_values + kept - returns).abs())
    return error.mul_(alive)
