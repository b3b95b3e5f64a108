"""Axes of charts: round ticks, scales from numbers to places, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 360, 210
"""Of a chart, in units of its view box: the browser scales it."""
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 34


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(x: float) -> str:
    """Write a number with three significant digits, or a count with a unit: 0.512, 12.3 k."""
    if not math.isfinite(x):
        return "undefined"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(x) >= size:
            return f"{x / (1e3 if unit == 'k' else size):.3g} {unit}"
    if x == 0:
        return "0"
    if abs(x) < 1e-3:
        mantissa, _, exponent = f"{x:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if abs(x) >= 1000:
        return f"{x:.0f}"
    return f"{x:.3g}"


@dataclass(frozen=True)
class Axes:
    """The plane of a chart."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        """Return the horizontal place of a number."""
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the vertical place of a number."""
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - BOTTOM - TOP)

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        """Return the path of a line."""
        return "M" + "L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))

    def area(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float]) -> str:
        """Return the path of the area between two lines."""
        back = "L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs[::-1], low[::-1], strict=True))
        return f"{self.path(xs, high)}L{back}Z"

    def frame(self, x_label: str, y_label: str = "") -> Markup:
        """Draw grid, ticks and the labels of the axes."""
        parts = []
        for tick in nice_ticks(self.y0, self.y1):
            y = f"{self.y(tick):.1f}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 6}" y="{y}" dy="0.32em" text-anchor="end">{short(tick)}</text>'
            )
        for tick in nice_ticks(self.x0, self.x1, 3):
            x = min(self.x(tick), WIDTH - RIGHT - 8)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 19}" text-anchor="middle">{short(tick)}</text>')
        labels = Markup('<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>').format(
            WIDTH - RIGHT, HEIGHT - 5, x_label
        )
        if y_label:
            labels += Markup('<text class="axis" x="{}" y="{}">{}</text>').format(6, HEIGHT - 5, y_label)
        return Markup("".join(parts)) + labels


def fit(xs: Iterable[float], ys: Iterable[float]) -> Axes:
    """Return axes that hold all points, with a little room above and below."""
    xs, ys = list(xs), list(ys)
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    if x1 <= x0:
        x0, x1 = x0 - 0.5, x1 + 0.5
    room = 0.06 * (y1 - y0) or 0.1 * abs(y1) or 0.5
    floor = 0.0 if 0 <= y0 < 0.3 * y1 else y0 - room  # a line that starts near 0 shows it
    return Axes(x0, x1, floor, y1 + room)
