"""The content of a report: its parts in order, from what the runs' folders hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ppo.runtime.diagnosis.healthy import Band
from rlhf_ppo.runtime.report import curves
from rlhf_ppo.runtime.report.axes import short
from rlhf_ppo.runtime.report.curves import Curve, Group
from rlhf_ppo.runtime.report.difference import first_difference
from rlhf_ppo.runtime.report.heat import recorded_views
from rlhf_ppo.runtime.report.parts import diversity, frontier, scatter, steps_chart, still, timings
from rlhf_ppo.runtime.report.run_files import RunFiles
from rlhf_ppo.runtime.report.samples import before_and_after, early_and_late, paired_rows
from rlhf_ppo.runtime.report.verdict import compare, judge

MOST_RUNS_IN_FULL = 3
"""Runs whose samples and tokens are shown."""


MOST_COMPARED = 6
"""Runs that are compared with the first one, rollout by rollout."""


def report_content(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Return everything that the template of a report needs."""
    groups = curves.group_runs(runs)
    several = len(runs) > 1
    kinds = {run.kind for run in runs}
    firsts = [group.runs[0] for group in groups][:MOST_RUNS_IN_FULL]
    judged = [(run, judge(run)) for run in runs]
    most = max(30, min(240, 2400 // len(runs)))
    first_screen, more = _curves(groups, most)
    content: dict[str, Any] = {
        "kind": "language" if "language" in kinds else "control",
        "heading": runs[0].name if not several else f"{len(runs)} runs compared",
        "lead": _lead(runs[0]) if not several else _folders(runs),
        "verdict": compare(groups) if several else judged[0][1],
        "each": [{**vars(verdict), "label": run.name} for run, verdict in judged] if several else [],
        "groups": groups,
        "seeds_note": "Where a setting has several seeds, the line is their interquartile mean, the area its 95 % "
        "bootstrap interval, and the faint lines are the seeds."
        if any(len(group.runs) > 1 for group in groups)
        else "",
        "curves": first_screen,
        "more": more,
        "writing": _charts(curves.WRITING, groups, most) if "language" in kinds else [],
        "findings": [
            {"label": run.name if several else "", "advice": advice}
            for run, verdict in judged
            for advice in verdict.findings
        ],
        "warned": [_warned(run, several) for run in runs if run.watch],
        "differences": [first_difference(runs[0], other) for other in _others(runs, groups)],
        "frontier": frontier(groups),
        "scatter": scatter(runs[0]) if not several else None,
        "diversity": [row for run in firsts if (row := diversity(run))],
        "samples": [block for run in firsts if (block := _samples(run, several))],
        "heats": [block for run in firsts if (block := _heats(run, several))],
        "stills": [picture for run in firsts if (picture := still(run))],
        "timings": [row for run in firsts if (row := timings(run, several))],
        "runs": [{"path": str(run.path), "rows": _settings(run)} for run in runs],
    }
    content["contents"] = _contents(content)
    content["notes"] = _notes(runs, content)
    return content


def _warned(run: RunFiles, several: bool) -> str:
    """Return what the watch said while the run went on."""
    said = [f"after {row['iteration']} updates, {row.get('rule')} ({row.get('seen')})" for row in run.watch[:10]]
    return f"While {run.name if several else 'it'} ran, it was warned {'; '.join(said)}."


def _others(runs: Sequence[RunFiles], groups: Sequence[Group]) -> list[RunFiles]:
    """Return the runs to compare with the first one: one of each other setting, or else the other seeds."""
    others = [group.runs[0] for group in groups[1:]] if len(groups) > 1 else list(runs[1:])
    return others[:MOST_COMPARED]


def _lead(run: RunFiles) -> str:
    facts = run.facts
    parts = []
    if run.kind == "control":
        parts.append(str(facts.get("env_id", "a control task")))
    else:
        rewards = facts.get("reward")
        parts.append(str(facts.get("model") or "a language model"))
        parts += (
            [f"reward {', '.join(str(reward).rpartition(':')[2] for reward in rewards)}"]
            if isinstance(rewards, list) and rewards
            else []
        )
    if run.updates:
        unit = "environment steps" if run.kind == "control" else "responses"
        done = run.updates[-1].get(run.x_key)
        parts += [] if done is None else [f"{done:,.0f} {unit}"]
        parts.append(f"{len(run.updates)} updates")
    parts += [f"seed {run.settings['seed']}"] if "seed" in run.settings else []
    return " · ".join(parts)


def _curves(groups: Sequence[Group], most: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the charts of the first screen and the others; runs of both frontends have charts of their own."""
    first: list[dict[str, Any]] = []
    more: list[dict[str, Any]] = []
    mixed = len({group.runs[0].kind for group in groups}) > 1
    for kind, main in (("language", curves.LANGUAGE), ("control", curves.CONTROL)):
        own = [group for group in groups if group.runs[0].kind == kind]
        if not own:
            continue
        runs = [run for group in own for run in group.runs]
        known = {curve.key for curve in main}
        others = [*(curve for curve in curves.MORE if curve.key not in known), *curves.other_curves(runs, own=True)]
        charts = _charts(main, own, most) or _charts(curves.other_curves(runs, own=False), own, most)
        for found, into in ((charts, first), (_charts(others, own, most), more)):
            into += [{**chart, "title": f"{chart['title']}, {kind}"} if mixed else chart for chart in found]
    return first, more


def _folders(runs: Sequence[RunFiles]) -> str:
    named = ", ".join(str(run.path) for run in runs[:MOST_COMPARED])
    return named if len(runs) <= MOST_COMPARED else f"{named} and {len(runs) - MOST_COMPARED} more"


def _charts(wanted: Sequence[Curve], groups: Sequence[Group], most: int) -> list[dict[str, Any]]:
    found = []
    for curve in wanted:
        if (svg := curves.draw_curve(curve, groups, most=most)) is not None:
            run = next(run for group in groups for run in group.runs if run.points(curve.key))
            band = curves.band_of(curve, run)
            words = "" if band is None or curve.key == "value/explained_variance" else _words(band)
            found.append({**curve._asdict(), "svg": svg, "band": words, "tinted": band is not None})
    return found


def _words(band: Band) -> str:
    if band.low is None:
        return f"below {short(band.high or 0.0)}"
    if band.high is None or band.high == 1.0:
        return f"above {short(band.low)}"
    return f"{short(band.low)} to {short(band.high)}"


def _samples(run: RunFiles, several: bool) -> dict[str, Any] | None:
    label = run.name if several else ""
    if pairs := before_and_after(run, 3 if several else 6):
        return {"label": label, "pairs": pairs}
    early, late = early_and_late(run)
    return {"label": label, "pairs": [], "early": early, "late": late} if early else None


def _heats(run: RunFiles, several: bool) -> dict[str, Any] | None:
    views = recorded_views(run, every=not several)
    return {"label": run.name if several else "", "views": views, "chart": steps_chart(run)} if views else None


def _settings(run: RunFiles) -> list[tuple[str, Any]]:
    facts = {key: value for key, value in run.facts.items() if key not in ("args", "fingerprints")}
    return list({**facts, **run.settings}.items())


def _contents(content: dict[str, Any]) -> list[tuple[str, str]]:
    tokens = "Token by token" if content["kind"] == "language" else "Step by step"
    named = {
        "each": ("Run by run", content["each"]),
        "findings": ("What stands out", content["findings"] or content["warned"]),
        "differences": ("Where the runs part", content["differences"]),
        "still": ("What the agent does", content["stills"]),
        "samples": ("Before and after", content["samples"]),
        "tokens": (tokens, content["heats"]),
        "distance": (
            "What the score cost",
            content["frontier"] or content["scatter"] or content["writing"] or content["diversity"],
        ),
        "more": ("More curves", content["more"]),
        "time": ("Time and memory", content["timings"]),
        "settings": ("What was run", True),
    }
    return [(place, name) for place, (name, shown) in named.items() if shown]


def _notes(runs: Sequence[RunFiles], content: dict[str, Any]) -> list[str]:
    """Say what a reader may look for in vain."""
    notes = []
    for run in runs:
        at = f"{run.name}: " if len(runs) > 1 else ""
        notes += [f"{at}{problem}" for problem in run.problems]
        if run.kind == "language" and run.updates and not run.recorded("tokens"):
            notes.append(f"{at}No tokens were recorded (record_tokens_every, or a run of an earlier version).")
        if run.kind == "language" and run.updates and not paired_rows(run):
            notes.append(f"{at}There is no evaluation before and after training (eval_dataset).")
        if run.kind == "control" and not run.recorded("steps"):
            notes.append(f"{at}No steps were recorded (a run of an earlier version, or one that did not end).")
        if run.kind == "control" and not (run.path / "still.png").is_file():
            still = f"classic-ppo evaluate {run.path} --video {run.path / 'still.png'}"
            notes.append(f"{at}There is no picture of an episode; {still} makes one (it needs rlhf-ppo[video]).")
    if len({run.kind for run in runs}) > 1:
        notes.append("These are runs of both frontends: no curve has all of them.")
    if len(content["groups"]) > MOST_RUNS_IN_FULL:
        notes.append(f"Samples, tokens and timings are those of the first {MOST_RUNS_IN_FULL} settings.")
    return notes
