"""Samples of a run: held-out prompts before and after, or else responses of its first and its last rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_ppo.runtime.report.run_files import RunFiles
from rlhf_ppo.runtime.texts import Piece, display_text, mark_differences

Row = Mapping[str, Any]
LONGEST = 1500
"""Characters of a text that are shown."""


class Sample(NamedTuple):
    """A response as it is shown."""

    pieces: list[Piece]
    facts: str
    """Score, KL and length in a line."""


class Pair(NamedTuple):
    """A prompt, and what followed it before and after."""

    prompt: str
    before: Sample
    after: Sample
    gain: float
    """How much higher the later score is."""


def first_and_last(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows of ``eval_samples.jsonl`` from before training and from its last whole evaluation.

    Both are in the order of the prompts. Of a run that is being evaluated now, the last lines are fewer.
    """
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["iteration"], []).append(row)
    before = groups.get(0, [])
    whole = [iteration for iteration, group in groups.items() if len(group) == len(before)]
    return before, groups[max(whole or groups, default=0)] if groups else []


def spread_by_improvement(before: Sequence[Row], after: Sequence[Row], count: int) -> list[tuple[Row, Row]]:
    """Choose ``count`` pairs at even quantiles of the change in score, so that neither luck nor taste picks them."""
    scored = [(a, b) for a, b in zip(before, after, strict=True) if a["score"] is not None and b["score"] is not None]
    ranked = sorted(scored, key=lambda pair: pair[1]["score"] - pair[0]["score"])
    count = min(count, len(ranked))
    return [ranked[int((i + 0.5) * len(ranked) / count)] for i in range(count)]


def whole_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have what a sample needs: prompt, completion, and a score that is a number or None."""
    return [row for row in rows if {"prompt", "completion", "score"} <= row.keys() and _is_score(row["score"])]


def _is_score(x: Any) -> bool:
    return x is None or (isinstance(x, (int, float)) and math.isfinite(x) and abs(x) < 1e300)


def paired_rows(run: RunFiles) -> list[tuple[Row, Row]]:
    """Return the held-out prompts' rows before and after training; [] without two evaluations of the same prompts."""
    before, after = first_and_last(whole_rows(run.eval_samples))
    if not before or not after or after[0]["iteration"] == 0 or len(before) != len(after):
        return []
    pairs = list(zip(before, after, strict=True))
    return pairs if all(a["prompt"] == b["prompt"] for a, b in pairs) else []


def before_and_after(run: RunFiles, count: int = 6) -> list[Pair]:
    """Choose held-out prompts to show, evenly spread from the least to the most improved."""
    rows = paired_rows(run)
    chosen = spread_by_improvement([a for a, _ in rows], [b for _, b in rows], count)
    return [_pair(a, b) for a, b in chosen]


def early_and_late(run: RunFiles, count: int = 3) -> tuple[list[tuple[str, Sample]], list[tuple[str, Sample]]]:
    """Return (prompt, response) of the first rollouts and of the last ones, where nothing was held out."""
    rows = whole_rows(run.samples)
    early, late = rows[:count], rows[count:][-count:]
    return [(_text(r["prompt"]), _alone(r)) for r in early], [(_text(r["prompt"]), _alone(r)) for r in late]


def _pair(a: Row, b: Row) -> Pair:
    left, right = mark_differences(_text(a["completion"]), _text(b["completion"]))
    return Pair(_text(a["prompt"]), Sample(left, facts(a)), Sample(right, facts(b)), b["score"] - a["score"])


def _alone(row: Row) -> Sample:
    return Sample([Piece(_text(row["completion"]), False)], facts(row))


def read_text(said: Any) -> str:
    """Return a prompt or completion as text, also of a damaged row."""
    try:
        return display_text(said)
    except (TypeError, KeyError, AttributeError):
        return str(said)


def _text(said: Any) -> str:
    text = read_text(said).strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"


def facts(row: Row) -> str:
    """Return a response's numbers in a line."""
    parts = ["unscored" if row["score"] is None else f"score {row['score']:.2f}"]
    parts += [f"{row['tokens']} tokens"] if isinstance(row.get("tokens"), int) else []
    kl = row.get("kl_nats")
    parts += (
        [f"{round(kl, 1) + 0.0:.1f} nats from the reference"]
        if isinstance(kl, (int, float)) and math.isfinite(kl)
        else []
    )
    parts += ["cut off"] if row.get("finished") is False else []
    return " · ".join(parts)
