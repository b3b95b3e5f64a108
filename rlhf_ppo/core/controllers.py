"""Controllers: adapt a coefficient to the KL just observed."""

from __future__ import annotations

import math


def _require_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")


def adapt_kl_coef(coef: float, observed_kl: float, *, target: float, horizon: float, num_samples: int) -> float:
    """Adapt the KL penalty's coefficient by a proportional controller.

    ``coef * (1 + clip(observed_kl / target - 1, -0.2, 0.2) * num_samples / horizon)``

    Args:
        coef: current coefficient.
        observed_kl: mean KL to the reference in nats per *response* (not per token); non-finite is ignored.
        target: target KL in the same unit.
        horizon: responses over which an error of 20 % changes the coefficient by 20 %.
        num_samples: responses behind ``observed_kl``.
    Raises:
        ValueError: target or horizon is not positive.
    Source: Ziegler et al. (2019), section 2.2.
    """
    _require_positive(target=target, horizon=horizon)
    if not math.isfinite(observed_kl):
        return coef
    error = min(max(observed_kl / target - 1, -0.2), 0.2)
    return float(coef * (1 + error * num_samples / horizon))


def adapt_penalty_beta(beta: float, observed_kl: float, *, target: float) -> float:
    """Adapt PPO-Penalty's beta, once per update: halve it below target / 1.5, double it above 1.5 * target.

    Args:
        beta: current coefficient of KL(old || new).
        observed_kl: mean KL(old || new) in nats per action; non-finite is ignored.
        target: target KL in the same unit.
    Raises:
        ValueError: target is not positive.
    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), section 4.
    """
    _require_positive(target=target)
    if not math.isfinite(observed_kl):
        return beta
    if observed_kl < target / 1.5:
        return beta / 2
    return beta * 2 if observed_kl > target * 1.5 else beta


def adapt_clip_range(
    clip_range: float, observed_kl: float, *, target: float, low: float = 0.02, high: float = 0.5
) -> float:
    """Adapt the clip range: halve it above 1.5 * target, double it below target / 1.5, within [low, high].

    Args:
        clip_range: current epsilon.
        observed_kl: mean KL(old || new) in nats per action; non-finite is ignored.
        target: target KL in the same unit.
        low, high: bounds; without them epsilon would drift to 0 or beyond 1.
    Raises:
        ValueError: target is not positive, or the bounds are not 0 < low <= high.
    """
    _require_positive(target=target, low=low)
    if low > high:
        raise ValueError(f"low={low} must not exceed high={high}")
    if not math.isfinite(observed_kl):
        return clip_range
    if observed_kl > target * 1.5:
        clip_range = clip_range / 2
    elif observed_kl < target / 1.5:
        clip_range = clip_range * 2
    return min(max(clip_range, low), high)
