"""Plot a report on a critic: what it explains by position, its calibration, and its lambdas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot_critic(report: Mapping[str, Any], path: Path) -> Path:
    """Plot a report (:func:`rlhf_ppo.pipeline.critic.critic_report.judge_critic`) in four panels and write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _positions(axes[0, 0], report["by_tenth"], "share of the response before the token")
    _positions(axes[0, 1], report["by_position"], "tokens before the token")
    _calibration(axes[1, 0], report["calibration"])
    _lambdas(axes[1, 1], report["lambdas"], report["supported_lambda"])
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    figure.suptitle(report["title"], fontsize=12)
    figure.savefig(path, dpi=130)
    return path


def _positions(axes: Any, rows: list[dict[str, float]], label: str) -> None:
    x = [(row["first"] + row["last"]) / 2 for row in rows]
    shares, errors = ([row[name] for row in rows] for name in ("explained_variance", "standard_error"))
    axes.errorbar(x, shares, yerr=errors, marker="o", markersize=4, linewidth=1.6, capsize=3)
    axes.axhline(0, color="gray", linestyle="--", linewidth=1)
    axes.set_xlabel(label)
    axes.set_ylabel("explained variance (bars: standard error)")


def _calibration(axes: Any, calibration: Mapping[str, Any]) -> None:
    rows = calibration["bins"]
    values, returns, errors = ([row[name] for row in rows] for name in ("value", "return", "error"))
    ends = [min(values + returns), max(values + returns)]
    axes.plot(ends, ends, color="gray", linestyle="--", linewidth=1, label="perfectly calibrated")
    axes.errorbar(values, returns, yerr=errors, marker="o", markersize=4, linewidth=1.6, capsize=3, label="observed")
    axes.set_xlabel("value")
    axes.set_ylabel("mean return that followed")
    axes.legend(fontsize=8)


def _lambdas(axes: Any, rows: list[dict[str, float]], supported: float) -> None:
    places = range(len(rows))  # lambdas crowd together below 1
    right = axes.twinx()
    for panel, name, label, color in (
        (axes, "squared_bias", "squared bias (lower bound)", "C0"),
        (axes, "variance", "variance", "C1"),
        (right, "alignment", "alignment (right)", "C2"),
    ):
        values, errors = ([row[key] for row in rows] for key in (name, f"{name}_error"))
        panel.errorbar(
            places, values, yerr=errors, color=color, marker="o", markersize=4, linewidth=1.6, capsize=3, label=label
        )
    axes.axvline([row["lambda"] for row in rows].index(supported), color="gray", linestyle="--", label="supported")
    axes.set_xticks(list(places), [f"{row['lambda']:g}" for row in rows])
    axes.set_xlabel("lambda")
    axes.set_ylabel("share of the variance under lambda 1")
    right.set_ylabel("correlation with what words bring")
    handles, labels = (
        left + own for left, own in zip(*(x.get_legend_handles_labels() for x in (axes, right)), strict=True)
    )
    axes.legend(handles, labels, fontsize=8, loc="upper left")
