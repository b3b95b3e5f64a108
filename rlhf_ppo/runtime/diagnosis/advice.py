"""Diagnose a run from its metrics and suggest which settings to change: the `advise` command, docs/tuning.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ppo.runtime.command_line.commands import AdviseArgs
from rlhf_ppo.runtime.diagnosis.rules import CLIPPING, RULES, Rule
from rlhf_ppo.runtime.diagnosis.symptoms import FEWEST_UPDATES, RunMetrics
from rlhf_ppo.runtime.logs.run_directory import RunDirectory, read_run


@dataclass(frozen=True)
class Advice:
    """A rule that a run's metrics match."""

    rule: Rule
    seen: str
    """The metrics that show it."""
    changes: dict[str, tuple[Any, Any]]
    """Setting -> (its value, the one to try)."""


def advise(folder: str | Path) -> list[Advice]:
    """Return the rules that a run's metrics match, the most serious first; [] if nothing stands out.

    Args:
        folder: a run's folder, of either frontend; the run may still be training.
    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: it has too few updates.
    """
    if not (Path(folder) / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl: name a run's folder")
    settings = read_run(folder)
    run = RunMetrics(RunDirectory(folder).read(), settings.get("args", settings))
    if len(run.rows) < FEWEST_UPDATES:
        raise ValueError(f"{folder} has {len(run.rows)} updates, too few to judge; it needs {FEWEST_UPDATES}")
    return advise_on(run)


def advise_on(run: RunMetrics) -> list[Advice]:
    """Return the rules that match, the most serious first."""
    return [found for rule in RULES if (found := judge(rule, run)) is not None]


def judge(rule: Rule, run: RunMetrics) -> Advice | None:
    """Return a rule's advice if the metrics match it."""
    seen = rule.seen(run)
    return None if seen is None else Advice(rule, seen, _changes(rule, run.settings))


def _changes(rule: Rule, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    changes: dict[str, tuple[Any, Any]] = {}
    for move in rule.moves:
        if move.setting not in settings or (move.setting == "clip_range" and settings.get("objective") not in CLIPPING):
            continue
        now = settings[move.setting]
        better = move.change(now)
        if better is not None and better != now:
            changes[move.setting] = (now, better)
    return changes


def in_words(advice: Advice) -> str:
    """Say what was seen, what it means and what to try, in one line."""
    tries = ", ".join(f"{setting} {now} -> {better}" for setting, (now, better) in advice.changes.items())
    return f"{advice.rule.name}: {advice.seen}. {advice.rule.meaning}" + (f" Try {tries}" if tries else "")


def print_advice(args: AdviseArgs) -> None:
    """Run the `advise` command."""
    found = advise(args.run)
    if not found:
        print("nothing stands out: all metrics are in the healthy ranges of docs/tuning.md")
    for advice in found:
        print(f"{advice.rule.name}: {advice.seen} (healthy: {advice.rule.healthy})")
        print(f"    {advice.rule.meaning}")
        for setting, (now, better) in advice.changes.items():
            print(f"    try {setting} {now} -> {better}")
    if any(advice.changes for advice in found):
        print("Change one setting at a time, and compare over several seeds.")


def tuning_page() -> str:
    """Return the page docs/tuning.md, generated from the rules."""
    rows = "\n".join(
        f"| {rule.name} | {rule.healthy} | {rule.meaning} | {'; '.join(move.how for move in rule.moves)} |"
        for rule in RULES
    )
    return (
        "# Tuning\n\n`rlhf-ppo advise RUN` and `classic-ppo advise RUN` read a run's `metrics.jsonl`, also while it is"
        " running,\nand report what stands out and which settings to change. Change one at a time;\n"
        "`classic-ppo compare` compares over seeds. This page is generated from the rules: `make docs`.\n"
        "What a language-model run chooses where you set no learning rate: "
        "[learning rates](models.md#learning-rates).\n\n"
        f"| symptom | healthy | what it means | try |\n|---|---|---|---|\n{rows}\n"
    )


if __name__ == "__main__":
    print(tuning_page(), end="")
