"""Report what a run changed on held-out prompts: differences with intervals, and samples side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.report.samples import first_and_last, spread_by_improvement
from rlhf_ppo.runtime.statistics import differences, interval
from rlhf_ppo.runtime.texts import display_text, printable

Row = Mapping[str, Any]

MEASURES = {
    "score": "score",
    "KL to the reference, nats per response": "kl_nats",
    "surprise to the reference, nats per token": "reference_nats_per_token",
    "length, tokens": "tokens",
}
"""Label in the table -> column of eval_samples.jsonl."""


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Compute the mean of ``after - before`` over pairs, and the half-width of its 95 % interval (NaN for one pair)."""
    found = interval(differences(after, before))
    mean, half_width = found["mean"], found["half_width"]
    return math.nan if mean is None else mean, math.nan if half_width is None else half_width


def first_and_last_evaluation(run: RunDirectory) -> tuple[list[Row], list[Row]]:
    """Read the rows of ``eval_samples.jsonl`` from before training and from its end, prompt by prompt."""
    return first_and_last(run.read("eval_samples.jsonl"))


def print_before_after(run: RunDirectory, *, samples: int = 4, console: Console | None = None) -> None:
    """Print the change in score, KL, fluency and length on the held-out prompts, then samples side by side.

    Of several processes, the first prints.
    """
    if not run.writes:
        return
    console = console or Console()
    before, after = first_and_last_evaluation(run)
    summary = Table(title=f"{len(before)} held-out prompts, before and after", title_justify="left")
    for heading in ("", "before", "after", "change (95 % interval)"):
        summary.add_column(heading, justify="left" if not heading else "right")
    for label, key in MEASURES.items():
        pairs = [
            (float(a[key]), float(b[key]))
            for a, b in zip(before, after, strict=True)
            if a[key] is not None and b[key] is not None
        ]
        firsts, lasts = zip(*pairs, strict=True)
        change, half = paired_difference(firsts, lasts)
        summary.add_row(
            label, f"{statistics.fmean(firsts):.3f}", f"{statistics.fmean(lasts):.3f}", f"{change:+.3f} ± {half:.3f}"
        )
    console.print(summary)
    title = f"{samples} of these prompts, evenly spread from the least to the most improved"
    side_by_side = Table(title=title, title_justify="left", show_lines=True)
    for heading in ("prompt", "before", "after"):
        side_by_side.add_column(heading, ratio=1 if heading == "prompt" else 2)
    for a, b in spread_by_improvement(before, after, samples):
        # As Text, so that brackets such as [/INST] are not read as markup.
        texts = display_text(a["prompt"]), _sample(a), _sample(b)
        side_by_side.add_row(*(Text(printable(text)) for text in texts))
    console.print(side_by_side)


def _sample(row: Row) -> str:
    score = "unscored" if row["score"] is None else f"{row['score']:+.2f}"
    return f"({score}) {display_text(row['completion']).strip()}"
