"""Curves: which metrics a report draws, what they mean and how a healthy one looks; runs of one setting as one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from rlhf_ppo.runtime.diagnosis.healthy import Band, healthy_band
from rlhf_ppo.runtime.logs.metrics import FAMILIES
from rlhf_ppo.runtime.report.axes import short
from rlhf_ppo.runtime.report.charts import Line, line_chart, thin
from rlhf_ppo.runtime.report.run_files import OF_THE_MACHINE, RunFiles, setting_differences
from rlhf_ppo.runtime.statistics import bootstrap_iqm

MOST_OTHERS = 8
"""Charts of metrics that this page does not know."""


class Curve(NamedTuple):
    """One chart over time."""

    key: str
    """The metric."""
    title: str
    unit: str
    healthy: str
    """How a healthy one looks."""
    dots: str | None = None
    """A metric of evaluations to draw as dots."""


LANGUAGE = (
    Curve("score/mean", "Score", "mean over a rollout's responses", "rises, then levels off", "eval/score_mean"),
    Curve(
        "kl/reference_nats_per_response",
        "KL to the reference",
        "nats per response",
        "grows with the score and then settles",
        "eval/kl_nats_per_response",
    ),
    Curve("policy/entropy", "Entropy", "nats per token", "falls slowly and never to nothing"),
    Curve(
        "value/explained_variance",
        "Critic",
        "explained variance of the returns",
        "rising; below 0 it harms",
    ),
)
CONTROL = (
    Curve(
        "episode/return_mean", "Return", "mean of the last 100 episodes", "rises, then levels off", "eval/mean_return"
    ),
    Curve("policy/approx_kl", "Update size", "KL(old || new), nats per action", "small and steady"),
    Curve("policy/entropy", "Entropy", "nats per action", "falls as the return rises"),
    Curve("value/explained_variance", "Critic", "explained variance of the returns", "close to 1 late in the run"),
)
CLIP_FRACTION = Curve("policy/clip_fraction", "Clip fraction", "share of actions", "some, but not most")
MORE = (
    CLIP_FRACTION,
    Curve("judge/score_mean", "Judges", "mean score of what is never trained on", "rises with the score"),
    Curve("policy/approx_kl", "Update size", "KL(old || new), nats per action", "small and steady"),
    Curve("optim/grad_norm", "Gradient norm", "before clipping", "no sudden jumps"),
    Curve(
        "policy/first_minibatch_max_abs_log_ratio",
        "Sampling against training",
        "largest log-ratio before a step",
        "rounding alone",
    ),
    Curve("value/loss", "Value loss", "half the squared error", "falls, then follows the returns"),
    Curve("kl/coef", "KL coefficient", "kl_coef", "steady, or moved by its controller"),
    Curve("optim/learning_rate", "Learning rate", "at the end of each update", "as planned"),
    Curve("score/length_correlation", "Score and length", "correlation", "not close to 1 or -1"),
    Curve("response/length_tokens", "Response length", "tokens", "does not drift to the limit", "eval/length_tokens"),
    Curve("response/eos_fraction", "Responses that end", "share with a stop token", "does not fall"),
    Curve("episode/length_mean", "Episode length", "steps", "as the task rewards"),
)
WRITING = (
    Curve("response/repeated_fraction", "Repetition", "share of 4-token runs said before", "stays close to its start"),
    Curve("response/distinct_2", "Distinct-2", "share of distinct token pairs", "falls little"),
)


def panels(curves: Sequence[Curve]) -> dict[str, str]:
    """Return metric -> label with its unit, as :func:`rlhf_ppo.runtime.plots.plot_curves` takes them."""
    return {curve.key: f"{curve.title}: {curve.unit}" for curve in curves}


def other_curves(runs: Sequence[RunFiles], *, own: bool) -> list[Curve]:
    """Return curves of metrics that this page has no chart for.

    Args:
        runs: the runs.
        own: those of the user's own families alone; False: all, for runs of another kind than PPO's.
    """
    known = {curve.key for curve in (*LANGUAGE, *CONTROL, *MORE, *WRITING)}
    keys = dict.fromkeys(key for run in runs for row in (*run.updates[-1:], *run.evaluations[-1:]) for key in row)
    wanted = [key for key in keys if key not in known and not key.startswith("progress/")]
    if own:
        parts = [key for key in wanted if key.startswith("score/part/")]
        wanted = [key for key in wanted if key.partition("/")[0] not in FAMILIES]
        wanted += parts if len(parts) > 1 else []  # a single part is the score
    return [Curve(key, key, "", "") for key in wanted[:MOST_OTHERS]]


@dataclass
class Group:
    """Runs of one setting, which differ in their seed alone."""

    label: str
    look: int
    runs: list[RunFiles] = field(default_factory=list)


def group_runs(runs: Sequence[RunFiles]) -> list[Group]:
    """Put runs that differ in nothing but their seed together, and name each group by what sets it apart."""
    ignored = (*OF_THE_MACHINE, "seed", "learning_rates", "num_threads", "device")
    found: dict[str, list[RunFiles]] = {}
    for run in runs:
        kept = {name: value for name, value in run.settings.items() if name not in ignored}
        # Of runs without settings nobody knows whether they are alike.
        key = repr(sorted(kept.items(), key=lambda item: item[0])) if kept else str(run.path)
        found.setdefault(f"{run.kind} {run.facts.get('env_id')} {key}", []).append(run)
    firsts = [members[0] for members in found.values()]
    apart = setting_differences(firsts, ignored)
    groups = []
    for look, members in enumerate(found.values()):
        if len(found) > 1 and 0 < len(apart) <= 3:
            label = ", ".join(f"{name} {_value(values[look])}" for name, values in apart.items())
        else:
            label = members[0].name
        seeds = f" ({len(members)} seeds)" if len(members) > 1 else ""
        groups.append(Group(label + seeds, look, members))
    return _told_apart(groups)


def _told_apart(groups: list[Group]) -> list[Group]:
    labels = [group.label for group in groups]
    for group in groups:
        if labels.count(group.label) > 1:
            group.label = f"{group.label}, {group.runs[0].path}"
    return groups


def _value(x: Any) -> str:
    return f"{x:g}" if isinstance(x, float) else str(x)


def draw_curve(curve: Curve, groups: Sequence[Group], *, most: int = 240) -> Markup | None:
    """Draw a metric of all groups; None if no run has it."""
    lines: list[Line] = []
    alone = len(groups) == 1
    seen = "held out" if groups[0].runs[0].kind == "language" else "evaluated"
    for group in groups:
        points = [found for run in group.runs if (found := run.points(curve.key))]
        if len(points) > 1:
            lines += [Line(group.label, *thin(found, most // 2), look=group.look, faint=True) for found in points]
            if (seeds := _over_seeds(points)) is not None:
                xs, middle, low, high = seeds
                lines.append(Line(group.label, xs, middle, group.look, low, high))
        else:
            name = "training" if alone and curve.dots else group.label
            lines += [Line(name, *thin(found, most), look=group.look) for found in points]
            if points and curve.dots and len(group.runs) == 1 and (dots := group.runs[0].points(curve.dots)):
                lines.append(
                    Line(
                        seen if alone else f"{group.label}, {seen}",
                        *thin(dots, most),
                        look=group.look,
                        dots=True,
                    )
                )
    if not lines:
        return None
    single = [line for line in lines if not line.faint]
    if not single:  # seeds that have no steps in common
        lines = [Line(line.label, line.xs, line.ys, line.look) for line in lines]
        single = lines
    said = "; ".join(f"{line.label}: from {short(line.ys[0])} to {short(line.ys[-1])}" for line in single[:8])
    run = groups[0].runs[0]
    return line_chart(
        lines, x_label=run.x_label, summary=f"{curve.title}, {curve.unit}. {said}.", band=band_of(curve, run)
    )


def band_of(curve: Curve, run: RunFiles) -> Band | None:
    """Return the healthy range of a curve."""
    metrics = run.metrics
    return healthy_band(curve.key, run.updates, _plain(metrics.settings), bf16=metrics.bf16)


def _plain(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: x for name, x in settings.items() if not isinstance(x, bool)}


def _over_seeds(
    runs: Sequence[Sequence[tuple[float, float]]],
) -> tuple[list[float], list[float], list[float], list[float]] | None:
    """Return (x, interquartile mean, low, high) over the steps that all seeds have; None without any in common."""
    first, last = max(run[0][0] for run in runs), min(run[-1][0] for run in runs)
    if first >= last:
        return None
    xs = np.linspace(first, last, min(100, max(map(len, runs))))
    values = np.stack([np.interp(xs, *np.array(run, dtype=float).T) for run in runs], axis=-1)
    middle, low, high = (part.tolist() for part in bootstrap_iqm([values]))
    return xs.tolist(), middle, low, high
