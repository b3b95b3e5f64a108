"""Plot learning curves, one panel per metric, and a reward model's calibration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_at_end(
    records: Sequence[Mapping[str, Any]], path: str | Path, *, x: str, panels: Mapping[str, str], title: str
) -> None:
    """Plot a run that has just ended, as :func:`plot_curves` does; a failure is a warning and ends no run."""
    try:
        plot_curves(records, path, x=x, panels=panels, title=title)
    except Exception as error:  # whatever it is, the run is done and saved
        warnings.warn(f"{Path(path).name} could not be drawn ({type(error).__name__}: {error})", stacklevel=2)


def plot_curves(
    records: Sequence[Mapping[str, Any]], path: str | Path, *, x: str, panels: Mapping[str, str], title: str
) -> Path:
    """Plot one panel per metric over ``x`` and write a PNG.

    Args:
        records: rows of ``metrics.jsonl``; rows without a metric are left out of its panel.
        path: the PNG to write.
        x: metric on the horizontal axis.
        panels: metric -> label with its unit; panels without data are left out.
        title: headline.
    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = {key: label for key, label in panels.items() if any(key in row and x in row for row in records)}
    figure = Figure(figsize=(4.2 * max(1, len(drawn)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (key, label) in enumerate(drawn.items()):
        axes = figure.add_subplot(1, len(drawn), i + 1)
        points = [(row[x], row[key]) for row in records if key in row and x in row]
        axes.plot(*zip(*points, strict=True), linewidth=1.8, marker="o" if len(points) < 12 else None, markersize=3)
        axes.set_xlabel(x.split("/")[-1].replace("_", " "))
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=12)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def plot_calibration(rows: Sequence[Mapping[str, float]], path: str | Path, *, title: str) -> Path:
    """Plot observed over predicted preferences and write a PNG.

    Args:
        rows: bins with ``pairs``, ``predicted``, ``observed`` and its interval ``low``, ``high``.
        path: the PNG to write.
        title: headline.
    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--", linewidth=1, label="perfectly calibrated")
    x, y = ([row[name] for row in rows] for name in ("predicted", "observed"))
    below, above = ([abs(row[name] - row["observed"]) for row in rows] for name in ("low", "high"))
    axes.errorbar(
        x, y, yerr=(below, above), marker="o", markersize=5, linewidth=1.6, capsize=3, label="observed, 95 % interval"
    )
    for row in rows:
        axes.annotate(
            f"{row['pairs']:.0f}", (row["predicted"], row["observed"]), (6, -10), textcoords="offset points", fontsize=8
        )
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min(0.45, *(row["low"] for row in rows)) - 0.05, 1.05)
    axes.set_xlabel("P(preferred answer is the chosen one), predicted")
    axes.set_ylabel("share in which it was (numbers: pairs)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.suptitle(title, fontsize=11)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
