"""Before and after: what a run changed on held-out prompts, with an interval, and samples side by side."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_ppo.runtime.run_directory import RunDirectory

Row = Mapping[str, Any]


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of ``after - before`` over pairs, and the half-width of its 95 % interval (1.96 standard errors)."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    if len(differences) < 2:
        return statistics.fmean(differences), math.nan
    return statistics.fmean(differences), 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))


def first_and_last_evaluation(run: RunDirectory) -> tuple[list[Row], list[Row]]:
    """The rows of ``eval_samples.jsonl`` from before training and from its end, prompt by prompt."""
    rows = run.read("eval_samples.jsonl")
    last = max(row["iteration"] for row in rows)
    return [row for row in rows if row["iteration"] == 0], [row for row in rows if row["iteration"] == last]


def print_before_after(run: RunDirectory, *, samples: int = 4, console: Console | None = None) -> None:
    """Print the change in score, KL, fluency and length on the held-out prompts, then samples side by side."""
    console = console or Console()
    before, after = first_and_last_evaluation(run)
    summary = Table(title=f"{len(before)} held-out prompts, before and after", title_justify="left")
    for heading in ("", "before", "after", "change (95 % interval)"):
        summary.add_column(heading, justify="left" if not heading else "right")
    for label, key in (
        ("score", "score"),
        ("KL to the reference, nats per response", "kl_nats"),
        ("surprise to the reference, nats per token", "reference_nats_per_token"),
        ("length, tokens", "tokens"),
    ):
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
    pictures = Table(title=title, title_justify="left", show_lines=True)
    for heading in ("prompt", "before", "after"):
        pictures.add_column(heading, ratio=1 if heading == "prompt" else 2)
    for a, b in spread_by_improvement(before, after, samples):
        pictures.add_row(*map(Text, (readable(a["prompt"]), _sample(a), _sample(b))))  # as it is: [/INST] is no markup
    console.print(pictures)


def spread_by_improvement(before: Sequence[Row], after: Sequence[Row], count: int) -> list[tuple[Row, Row]]:
    """``count`` pairs at even quantiles of the change in score, so that neither luck nor taste picks the samples."""
    scored = [(a, b) for a, b in zip(before, after, strict=True) if a["score"] is not None and b["score"] is not None]
    ranked = sorted(scored, key=lambda pair: pair[1]["score"] - pair[0]["score"])
    count = min(count, len(ranked))
    return [ranked[int((i + 0.5) * len(ranked) / count)] for i in range(count)]


def _sample(row: Row) -> str:
    score = "unscored" if row["score"] is None else f"{row['score']:+.2f}"
    return f"({score}) {readable(row['completion']).strip()}"


def readable(said: Any) -> str:
    """A prompt or completion for the eye: text as it is, a chat as "role: content", a message below the other."""
    if isinstance(said, str):
        return said
    return "\n".join(f"{message['role']}: {_content(message)}" for message in said)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        return json.dumps(message.get("tool_calls"), ensure_ascii=False, default=str)
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", f"[{part.get('type')}]")) for part in content)
