"""Comparison: means with intervals, win rates with intervals, and how varied texts are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def interval(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean of the values that are there and the half-width of its 95 % interval (1.96 standard errors).

    Returns:
        {mean, half_width}; None where there is no value, or one value and so no spread.
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
    """ours - theirs for each pair with two values."""
    return [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]


def win_rate(ours: Iterable[float | None], theirs: Iterable[float | None]) -> dict[str, float]:
    """Share of pairs in which ours has the higher score, ties counted half, with a 95 % interval.

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
    """95 % interval of a share seen in ``n`` trials; it stays inside [0, 1] and is no point where all trials agree.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams of the texts together, from 0 to 1; 0 without any.

    It falls as more text is counted, so compare equal numbers of texts of like length only.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models" (2016).
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
