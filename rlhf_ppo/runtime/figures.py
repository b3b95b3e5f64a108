"""A run's figures: what metrics.jsonl says of its updates, averaged over parts of the run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

FEWEST_UPDATES = 6
"""Updates below which a run says nothing yet."""


class Figures:
    """The lines of a run's updates, read as averages over parts of it."""

    def __init__(self, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
        """``rows`` as in metrics.jsonl, evaluations among them; ``settings`` by name."""
        first = settings.get("critic_warmup_rollouts") or 0  # until then the policy does not learn
        self.rows = [row for row in rows if "policy/loss" in row and row["progress/iteration"] > first]
        self.settings = settings

    @property
    def bf16(self) -> bool:
        """Whether products were, or may have been, computed in bf16, which rounds decoding and training differently."""
        computed = self.settings.get("fingerprints", {}).get("bf16")
        return self.settings.get("precision", "fp32") != "fp32" if computed is None else computed

    def values(self, key: str) -> list[float]:
        """A metric's values, update by update, where it was written."""
        return [row[key] for row in self.rows if key in row]

    def whole(self, key: str) -> float | None:
        """Its mean over the run, or None if it was never written."""
        return _mean(self.values(key))

    def late(self, key: str) -> float | None:
        """Its mean over the second half."""
        values = self.values(key)
        return _mean(values[len(values) // 2 :])

    def ends(self, key: str) -> tuple[float, float] | None:
        """Its means over the first tenth and over the last, of three updates or more."""
        values = self.values(key)
        part = max(len(values) // 10, 3)
        return (statistics.fmean(values[:part]), statistics.fmean(values[-part:])) if len(values) >= 2 * part else None

    def rises(self, *, within: float = 1.0) -> bool:
        """Whether score or return got better over the last part of the run (1: the whole), beyond its noise."""
        values = self.values("score/mean") or self.values("episode/return_mean")
        values = values[-max(int(within * len(values)), FEWEST_UPDATES) :]
        half = len(values) // 2
        if half < 2:
            return False
        before, after = values[:half], values[-half:]
        noise = (statistics.variance(before) / half + statistics.variance(after) / half) ** 0.5
        return statistics.fmean(after) - statistics.fmean(before) > 2 * noise


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
