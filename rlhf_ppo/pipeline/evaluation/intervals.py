"""Compare models: means and win rates with intervals, calibration of preferences, diversity of texts."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from rlhf_ppo.runtime.statistics import differences


def win_rate(ours: Iterable[float | None], theirs: Iterable[float | None]) -> dict[str, float]:
    """Compute the share of pairs in which ours has the higher score, ties counted half, with a 95 % interval.

    The interval is Wilson's (see :func:`wilson`); ties make it a little too wide.

    Returns:
        {mean, low, high, judged, ties}.
    Raises:
        ValueError: no pair has two scores.
    """
    gaps = differences(ours, theirs)
    if not gaps:
        raise ValueError("the judge scored no pair of responses (None for one of each): there is no win rate")
    n, ties = len(gaps), sum(gap == 0 for gap in gaps)
    share = (sum(gap > 0 for gap in gaps) + 0.5 * ties) / n
    low, high = wilson(share, n)
    return {"mean": share, "low": low, "high": high, "judged": n, "ties": ties}


def wilson(share: float, n: int) -> tuple[float, float]:
    """Compute the 95 % interval of a share seen in ``n`` trials, inside [0, 1] and never empty.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def calibration(gap: Tensor) -> list[dict[str, float]]:
    """Compare how sure a reward model is of its preferences with how often they are right, in bins.

    A pair has no natural order, so each is asked about the answer with the higher score: predicted is sigmoid(|gap|),
    from 0.5 to 1; observed is the share in which that answer was the chosen one (a tie counts half).

    Args:
        gap: [N] chosen - rejected score.
    Returns:
        A row per bin, from unsure to sure: pairs, mean prediction, observed share and its 95 % interval. There are at
        most 10 bins, with equal numbers of pairs, at least 25.
    """
    predicted, order = gap.double().abs().sigmoid().sort()
    right = ((gap > 0).double() + 0.5 * (gap == 0).double())[order]
    bins = min(10, max(1, len(gap) // 25))
    rows: list[dict[str, float]] = []
    for says, was in zip(predicted.tensor_split(bins), right.tensor_split(bins), strict=True):
        low, high = wilson(float(was.mean()), len(was))
        rows.append(
            {
                "pairs": len(was),
                "predicted": float(says.mean()),
                "observed": float(was.mean()),
                "low": low,
                "high": high,
            }
        )
    return rows
