"""Compare few runs by their interquartile mean and its bootstrap interval, and many values by their mean's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

RESAMPLES = 2000


def iqm(scores: np.ndarray) -> np.ndarray:
    """Compute the interquartile mean over the last axis: the mean of the middle half of the values.

    A value that straddles a quartile counts with the share inside, so any number of runs works. One lucky or failed
    seed moves it less than the mean, and it discards less data than the median.

    Args:
        scores: [..., n] one value per run, n at least 1.
    Returns:
        [...] the means.
    Source: Agarwal et al., "Deep RL at the Edge of the Statistical Precipice" (2021), section 4.3; the fractional
    weights are ours (they drop whole runs).
    """
    n = scores.shape[-1]
    # In sorted order run i covers [i, i + 1] / n of the distribution.
    edges = np.arange(n + 1) / n
    inside = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, None)
    return np.sort(scores, axis=-1) @ (inside / inside.sum())


def bootstrap_iqm(
    strata: Sequence[np.ndarray], *, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the IQM of all runs and its bootstrap interval, from resampling the runs of each stratum.

    Args:
        strata: one [..., n] array for each environment, its runs last; resampling never mixes environments.
        level: share of resamples within the interval.
        seed: of the resampling, so that a table is reproducible.
    Returns:
        (iqm, low, high), each [...]. With one run the interval is that run's value and means nothing.
    """
    draw = np.random.default_rng(seed)
    resampled = []
    for scores in strata:
        runs = draw.integers(scores.shape[-1], size=(RESAMPLES, scores.shape[-1]))
        resampled.append(scores[..., runs])  # [..., RESAMPLES, n]
    means = iqm(np.concatenate(resampled, axis=-1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return iqm(np.concatenate(list(strata), axis=-1)), low, high


def mean_and_error(scores: np.ndarray) -> str:
    """Format mean and standard error over runs for a table; only the mean of a single run.

    Args:
        scores: [n] one value per run.
    """
    n = len(scores)
    error = f" +- {scores.std(ddof=1) / np.sqrt(n):.1f}" if n > 1 else ""
    return f"{scores.mean():.1f}{error}"


def interval(values: Iterable[float | None]) -> dict[str, float | None]:
    """Compute the mean of the values that are not None, and the half-width of its 95 % interval (1.96 standard errors).

    Returns:
        {mean, half_width}; both None without any value, the half-width also for a single one.
    """
    found = [value for value in values if value is not None]
    if not found:
        return {"mean": None, "half_width": None}
    if len(found) == 1:
        return {"mean": found[0], "half_width": None}
    return {
        "mean": statistics.fmean(found),
        "half_width": 1.96 * statistics.stdev(found) / math.sqrt(len(found)),
    }


def differences(ours: Iterable[float | None], theirs: Iterable[float | None]) -> list[float]:
    """Compute ours - theirs of each pair; pairs with a None are left out."""
    return [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
