"""Healthy ranges of metrics: what symptoms are looked for outside of, and what reports draw behind the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

CLIP_FRACTION = (0.01, 0.3)
APPROX_KL = (1e-3, 0.05)
"""KL(old || new), nats per action."""
EXPLAINED_VARIANCE = -0.05
"""At least; returns that are all alike leave nothing to explain."""
KL_PER_TOKEN = 0.25
"""KL to the reference at most, nats per token."""
ENTROPY_LEFT = 0.1
"""Share of the initial entropy that is left half-way."""
LARGE = 100.0
"""Returns and advantages at most, unless the critic learns in units of their spread."""
GRADIENT = 50.0
"""Gradient norm at most, in units of max_grad_norm."""
EPOCHS = 0.75
"""Share of the epochs that target_kl lets run."""


class Band(NamedTuple):
    """A healthy range; None: no bound on that side."""

    low: float | None
    high: float | None


def log_ratio_bound(*, bf16: bool) -> float:
    """Return the largest |log-ratio| in nats before a rollout's first optimizer step that rounding explains."""
    return 0.5 if bf16 else 0.1


def healthy_band(
    key: str, rows: Sequence[Mapping[str, float]], settings: Mapping[str, Any], *, bf16: bool
) -> Band | None:
    """Return the healthy range of a metric in a run; None: there is none.

    Args:
        key: the metric.
        rows: the run's updates, as in metrics.jsonl.
        settings: the run's.
        bf16: it computes in bfloat16.
    """
    match key:
        case "policy/clip_fraction":
            return Band(*CLIP_FRACTION)
        case "policy/approx_kl":
            return Band(None, APPROX_KL[1])
        case "value/explained_variance":
            return Band(EXPLAINED_VARIANCE, 1.0)
        case "policy/first_minibatch_max_abs_log_ratio":
            return Band(None, log_ratio_bound(bf16=bf16))
        case "kl/reference_nats_per_response":
            length = _first(rows[-1:], "response/length_tokens")
            return None if length is None else Band(None, KL_PER_TOKEN * length)
        case "policy/entropy":
            start = _first(rows, "policy/entropy")
            return None if start is None or start <= 0 else Band(ENTROPY_LEFT * start, None)
        case "optim/grad_norm":
            limit = settings.get("max_grad_norm")
            return Band(None, GRADIENT * limit) if isinstance(limit, (int, float)) and limit > 0 else None
    return None


def _first(rows: Sequence[Mapping[str, float]], key: str) -> float | None:
    return next((row[key] for row in rows if key in row), None)
