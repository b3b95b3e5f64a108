"""Value scale: the mean and spread of the returns, in whose units a critic learns whatever the reward's units are.

A critic that predicts ``(V - mean) / std`` has targets of mean 0 and spread 1 for every reward. A score of
``a * s + b`` then trains the same policy as ``s``, and learning rate, vf_coef and clip_range_vf mean the same for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rlhf_ppo.core.masked import masked_mean, masked_var


@dataclass(frozen=True)
class ValueScale:
    """Running mean and standard deviation of returns; the default leaves values in the reward's own units."""

    mean: float = 0.0
    std: float = 1.0
    count: int = 0
    """Rollouts that it was estimated from."""

    def normalize(self, x: Tensor) -> Tensor:
        """Convert values or returns [*] from the reward's units: ``(x - mean) / std``."""
        return (x - self.mean) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        """Convert values [*] to the reward's units: ``mean + std * x``."""
        return self.mean + self.std * x


_FARTHEST = 1e4
"""A return further from the mean than this many deviations counts as one at that distance."""


def update_value_scale(
    scale: ValueScale | None, returns: Tensor, mask: Tensor, *, min_rate: float = 0.05, min_std: float = 0.0
) -> ValueScale:
    """Update the running moments by one rollout: with weight 1 / (rollouts so far), and at least ``min_rate``.

    One absurd return must not make all others look alike for hundreds of rollouts, so its pull is bounded; one whose
    square, in the units so far, is beyond float32 leaves the scale alone, and overflows the value loss.

    Args:
        scale: the moments so far; None: this is the first rollout.
        returns: [B, T] observed returns in the reward's units; float64 keeps a small spread beside a large mean.
        mask: [B, T] bool.
        min_rate: weight of a rollout once many have been seen.
        min_std: smallest standard deviation, in the reward's units; a deviation of 0 becomes 1.
    Returns:
        The new moments; ``scale`` itself (or the default) if the mask is empty or a return is not finite or that far.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    Source: van Hasselt et al., "Learning values across many orders of magnitude" (2016), section 2. The decreasing
    weight of the first rollouts, the smallest deviation and the bound on a return's pull are ours.
    """
    old = scale or ValueScale()
    if not mask.any() or not old.normalize(returns)[mask].float().square().isfinite().all():
        return old
    if old.count:
        returns = returns.clamp(old.mean - _FARTHEST * old.std, old.mean + _FARTHEST * old.std)
    mean, var = float(masked_mean(returns, mask)), float(masked_var(returns, mask))
    rate = max(1 / (old.count + 1), min_rate)
    shift = mean - old.mean if old.count else 0.0
    mixed = (1 - rate) * (old.std**2 + rate * shift**2) + rate * var if old.count else var
    std = max(math.sqrt(mixed), min_std)
    return ValueScale(old.mean + rate * shift if old.count else mean, std if std > 0 else 1.0, old.count + 1)


def rescaled_head(weight: Tensor, bias: Tensor, old: ValueScale, new: ValueScale) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear value head that predicts the same values after the scale has changed.

    Args:
        weight: [1, O] of the head under ``old``.
        bias: [1] likewise.
        old, new: ``old.denormalize(head(x))`` equals ``new.denormalize(new_head(x))``.
    Source: PopArt: van Hasselt et al. (2016), proposition 1.
    """
    ratio = old.std / new.std
    return weight * ratio, bias * ratio + (old.mean - new.mean) / new.std
