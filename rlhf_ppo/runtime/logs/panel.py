"""Panel: a run's numbers on a terminal, each with a sparkline, and a sample of what the policy writes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from rlhf_ppo.runtime.diagnosis.healthy import healthy_band
from rlhf_ppo.runtime.texts import printable

BLOCKS = "▁▂▃▄▅▆▇█"
MOST = 256
"""Numbers that are kept of each curve; beyond, neighbours are averaged."""


class Row(NamedTuple):
    """A number of the panel."""

    label: str
    key: str
    """The metric; "speed" is not one."""
    target: str | None = None
    """The setting that says where it should be."""


LANGUAGE_MODEL = (
    Row("score", "score/mean"),
    Row("KL", "kl/reference_nats_per_response", "kl_target"),
    Row("entropy", "policy/entropy"),
    Row("length", "response/length_tokens"),
    Row("clipped", "policy/clip_fraction"),
    Row("critic", "value/explained_variance"),
    Row("judge", "judge/score_mean"),
    Row("tokens/s", "speed"),
)
AGENT = (
    Row("return", "episode/return_mean"),
    Row("length", "episode/length_mean"),
    Row("entropy", "policy/entropy"),
    Row("KL", "policy/approx_kl", "target_kl"),
    Row("clipped", "policy/clip_fraction"),
    Row("critic", "value/explained_variance"),
    Row("steps/s", "speed"),
)


class RunPanel:
    """The latest numbers of a run, those outside their healthy range in yellow, and their curves so far."""

    def __init__(self, rows: Sequence[Row], settings: Mapping[str, Any], *, bf16: bool = False) -> None:
        """Begin an empty panel.

        Args:
            rows: what it shows of what it is given.
            settings: the run's, by name: targets, and what is healthy.
            bf16: the run computes in bfloat16.
        """
        self._rows, self._settings, self._bf16 = rows, settings, bf16
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._curves: dict[str, list[float]] = {row.key: [] for row in rows}
        self._sample: tuple[str, str, str] | None = None

    def add(self, numbers: Mapping[str, float], sample: tuple[str, str, float | None] | None = None) -> None:
        """Add an update's numbers, and a prompt with the response to it and its score.

        Numbers that are not finite, as where every step was skipped, are left out.
        """
        numbers = {name: x for name, x in numbers.items() if math.isfinite(x)}
        self._first, self._last = self._first or numbers, numbers
        for key, curve in self._curves.items():
            if key in numbers:
                curve.append(numbers[key])
                if len(curve) > MOST:
                    self._curves[key] = compress(curve, MOST // 2)
        if sample is not None:
            prompt, said, score = sample
            end = "" if score is None else f"  {score:.3g}"
            self._sample = printable(" ".join(prompt.split())), printable(" ".join(said.split())), end

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render two numbers a line, or one on a narrow terminal."""
        try:
            parts = self._parts(options.max_width)
        except Exception as error:  # what a run shows must not end it
            parts = [Text(f"these numbers cannot be shown: {error!r}", no_wrap=True, overflow="ellipsis")]
        yield from parts

    def _parts(self, width: int) -> list[Table | Text]:
        columns = 2 if width >= 68 else 1
        label, value = max(len(row.label) for row in self._rows) + 1, 13
        spark = min(32, width // columns - label - value - 3)
        table = Table.grid(padding=(0, 1))
        cells = [self._cells(row, spark) for row in self._rows if row.key in self._last]
        for i in range(0, len(cells), columns):
            line = [cell for some in cells[i : i + columns] for cell in some]
            table.add_row(*line)
        for i, column in enumerate(table.columns):
            column.no_wrap, column.overflow = True, "ellipsis"
            column.min_width = (label, value, max(spark, 0))[i % 3]
            column.justify = "right" if i % 3 == 1 else "left"
        return [table] if self._sample is None else [table, self._sample_text(2 * width)]

    def _cells(self, row: Row, width: int) -> tuple[Text, Text, Text]:
        number, target = self._last[row.key], self._settings.get(row.target or "")
        aim = f" of {target:g}" if isinstance(target, (int, float)) else ""
        band = healthy_band(row.key, [self._first, self._last], self._settings, bf16=self._bf16)
        low, high = (None, None) if band is None else band
        outside = (low is not None and number < low) or (high is not None and number > high)
        shown = Text(f"{number:.3g}{aim}", style="yellow" if outside else "")
        return Text(row.label, style="dim"), shown, Text(sparkline(self._curves[row.key], width), style="cyan")

    def _sample_text(self, room: int) -> Text:
        """Return the sample in two lines at most; of a long prompt the end, of a long response the beginning."""
        assert self._sample is not None
        prompt, said, end = self._sample
        room -= len(end) + 2  # what is lost where a word does not fit
        kept = max(room // 3, room - len(said))
        if len(prompt) > kept:
            prompt = "…" + prompt[len(prompt) - kept + 1 :]
        if len(said) > room - len(prompt) - 1:
            said = said[: max(0, room - len(prompt) - 12)] + "…"
        return Text.assemble((f"{prompt} ", "dim"), said, (end, "cyan"))


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw numbers as blocks of eight heights, at most ``width`` of them; equal ones, up to 1 %, are drawn low.

    Those that are not finite are left out.
    """
    values = [x for x in values if math.isfinite(x)]
    if not values or width < 1:
        return ""
    shown = compress(values, width)
    low, high = min(shown), max(shown)
    step = (high - low) / (len(BLOCKS) - 1)
    flat = high - low <= 0.01 * max(abs(high), abs(low))
    return "".join(BLOCKS[0 if flat else round((x - low) / step)] for x in shown)


def compress(values: Sequence[float], count: int) -> list[float]:
    """Return at most ``count`` numbers, each the mean of neighbours."""
    if len(values) <= count:
        return list(values)
    edges = [i * len(values) // count for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
