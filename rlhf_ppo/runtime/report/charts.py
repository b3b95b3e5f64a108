"""Charts as inline SVG: lines over time with intervals and healthy bands, points in a plane, shares of a whole.

Each chart has a sentence for those who cannot see it, and its numbers as data, which the page's script reads out under
the pointer or the arrow keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rlhf_ppo.runtime.diagnosis.healthy import Band
from rlhf_ppo.runtime.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, fit, short

SERIES = 6
"""Looks of lines: after the sixth, they begin again with the first."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    xs: list[float]
    ys: list[float]
    look: int = 0
    """Which of the looks (colour and dashes)."""
    low: list[float] | None = None
    high: list[float] | None = None
    """An interval around it."""
    faint: bool = False
    """One of several seeds, behind their mean."""
    dots: bool = False
    """Draw points alone, such as evaluations."""


def thin(points: Sequence[tuple[float, float]], most: int) -> tuple[list[float], list[float]]:
    """Return at most ``most`` points: means of consecutive ones, and the last as it is."""
    if len(points) <= most:
        return [x for x, _ in points], [y for _, y in points]
    size = math.ceil((len(points) - 1) / (most - 1))
    parts = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    xs = [sum(x for x, _ in part) / len(part) for part in parts]
    ys = [sum(y for _, y in part) / len(part) for part in parts]
    return [*xs, points[-1][0]], [*ys, points[-1][1]]


def line_chart(lines: Sequence[Line], *, x_label: str, summary: str, band: Band | None = None) -> Markup:
    """Draw lines over time.

    Args:
        lines: at least one, each with at least one point.
        x_label: of the horizontal axis.
        summary: what the chart shows, in a sentence.
        band: the healthy range, drawn behind the lines.
    """
    ys = [y for line in lines for part in (line.ys, line.low, line.high) for y in part or ()]
    reach = max(ys) - min(ys)
    # A bound that is not far away is in the picture, so that one sees how far.
    near = [y for y in band or () if y is not None and min(ys) - reach <= y <= max(ys) + reach]
    axes = fit((x for line in lines for x in line.xs), [*ys, *near])
    parts = [_band(axes, band), axes.frame(x_label)]
    for line in sorted(lines, key=lambda line: not line.faint):
        look = f"s{line.look % SERIES}"
        if line.low is not None and line.high is not None:
            parts.append(
                Markup('<path class="interval {}" d="{}"/>').format(look, axes.area(line.xs, line.low, line.high))
            )
        if line.dots or len(line.xs) == 1:
            parts += [_dot(axes, x, y, look, 3.5) for x, y in zip(line.xs, line.ys, strict=True)]
        if not line.dots and len(line.xs) > 1:
            faint = " faint" if line.faint else ""
            parts.append(Markup('<path class="line {}{}" d="{}"/>').format(look, faint, axes.path(line.xs, line.ys)))
    read = [
        {"label": line.label, "look": line.look % SERIES, "points": _points(axes, line)}
        for line in lines
        if not line.faint
    ]
    return _svg(Markup("").join(parts), summary, {"x": x_label, "lines": read})


def plane_chart(lines: Sequence[Line], *, x_label: str, y_label: str, summary: str, joined: bool = False) -> Markup:
    """Draw points in a plane, such as score over KL.

    Args:
        lines: the points.
        x_label, y_label: of the axes.
        summary: what the chart shows, in a sentence.
        joined: draw a line from each point to the next, from "start" to "end".
    """
    axes = fit([x for line in lines for x in line.xs], [y for line in lines for y in line.ys])
    parts = [axes.frame(x_label, y_label)]
    for line in lines:
        look = f"s{line.look % SERIES}"
        if joined and len(line.xs) > 1:
            parts.append(Markup('<path class="line {}" d="{}"/>').format(look, axes.path(line.xs, line.ys)))
        last = len(line.xs) - 1
        for i, (x, y) in enumerate(zip(line.xs, line.ys, strict=True)):
            parts.append(_dot(axes, x, y, look, 4.5 if joined and i == last else 2.4 if joined else 2.8))
    read = [{"label": line.label, "look": line.look % SERIES, "points": _points(axes, line)} for line in lines]
    return _svg(Markup("").join(parts), summary, {"x": x_label, "lines": read, "plane": True})


def share_bar(parts: Sequence[tuple[str, float, str]], summary: str) -> Markup:
    """Draw shares of a whole side by side: (label, size, what to say) each."""
    whole, at, drawn = sum(size for _, size, _ in parts) or 1.0, 0.0, []
    for number, (label, size, said) in enumerate(parts):
        width = size / whole * 1000
        rect = Markup('<rect class="s{}" x="{:.1f}" y="0" width="{:.1f}" height="28"><title>{}: {}</title></rect>')
        drawn.append(rect.format(number % SERIES, at, max(width - 2, 0.5), label, said))
        at += width
    bar = Markup(
        '<svg class="shares" viewBox="0 0 1000 28" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    )
    return bar.format(summary, Markup("").join(drawn))


def _band(axes: Axes, band: Band | None) -> Markup:
    if band is None:
        return Markup("")
    low = axes.y0 if band.low is None else min(max(band.low, axes.y0), axes.y1)
    high = axes.y1 if band.high is None else min(max(band.high, axes.y0), axes.y1)
    top, bottom = axes.y(high), axes.y(low)
    if bottom - top < 0.5:
        return Markup("")
    rect = f'<rect class="band" x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{bottom - top:.1f}"/>'
    edges = [(band.low, bottom), (band.high, top)]
    lines = [
        f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        for bound, y in edges
        if bound is not None and TOP < y < HEIGHT - BOTTOM
    ]
    return Markup(rect + "".join(lines))


def _dot(axes: Axes, x: float, y: float, look: str, radius: float) -> Markup:
    return Markup(f'<circle class="dot {look}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="{radius}"/>')


def _points(axes: Axes, line: Line) -> list[list[float | str]]:
    """Return [place x, place y, what to say of x, of y] of each point."""
    return [
        [round(axes.x(x), 1), round(axes.y(y), 1), short(x), short(y)] for x, y in zip(line.xs, line.ys, strict=True)
    ]


def _svg(drawn: Markup, summary: str, read: dict[str, object]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" tabindex="0" aria-label="{}" data-read="{}">{}'
        '<g class="cursor" aria-hidden="true"></g></svg><p class="readout"></p>'
    ).format(WIDTH, HEIGHT, summary, json.dumps(read, separators=(",", ":")), drawn)
