"""`advise`: what a run's numbers say about its settings, and which one to move where; the tuning guide, executed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ppo.runtime.commands import AdviseArgs
from rlhf_ppo.runtime.run_directory import RunDirectory, read_run
from rlhf_ppo.runtime.tuning_rules import CLIPPING, FEWEST_UPDATES, RULES, Figures, Rule


@dataclass(frozen=True)
class Advice:
    """A rule that a run met."""

    rule: Rule
    seen: str
    changes: dict[str, tuple[Any, Any]]
    """Setting -> (its value, the one to try)."""


def advise(folder: str | Path) -> list[Advice]:
    """What a run's figures say, the most serious first; [] if nothing stands out.

    Args:
        folder: a run's folder, of a language model or of a control task, finished or not.
    Raises:
        FileNotFoundError: no run is there.
        ValueError: it has made too few updates.
    """
    if not (Path(folder) / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl: name the folder of a run")
    settings = read_run(folder)
    run = Figures(RunDirectory(folder).read(), settings.get("args", settings))
    if len(run.rows) < FEWEST_UPDATES:
        raise ValueError(f"{folder} has {len(run.rows)} updates, too few to say anything; {FEWEST_UPDATES} are needed")
    found = [(rule, seen) for rule in RULES if (seen := rule.seen(run)) is not None]
    return [Advice(rule, seen, _changes(rule, run.settings)) for rule, seen in found]


def _changes(rule: Rule, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    changes: dict[str, tuple[Any, Any]] = {}
    for move in rule.moves:
        if move.setting not in settings or (move.setting == "clip_range" and settings["objective"] not in CLIPPING):
            continue
        now = settings[move.setting]
        better = move.change(now)
        if better is not None and better != now:
            changes[move.setting] = (now, better)
    return changes


def print_advice(args: AdviseArgs) -> None:
    """The `advise` command."""
    found = advise(args.run)
    if not found:
        print("nothing stands out: all figures are in the bands of docs/tuning.md")
    for advice in found:
        print(f"{advice.rule.name}: {advice.seen} (healthy: {advice.rule.healthy})")
        print(f"    {advice.rule.meaning}")
        for setting, (now, better) in advice.changes.items():
            print(f"    try {setting} {now} -> {better}")
    if any(advice.changes for advice in found):
        print("One change at a time, over a few seeds.")


def tuning_page() -> str:
    """The documentation page `docs/tuning.md`, made from the rules."""
    rows = "\n".join(
        f"| {rule.name} | {rule.healthy} | {rule.meaning} | {'; '.join(move.how for move in rule.moves)} |"
        for rule in RULES
    )
    return (
        "# Tuning\n\n`rlhf-ppo advise RUN` and `classic-ppo advise RUN` read a run's `metrics.jsonl`, finished or not,"
        " and name\nwhat stands out and which setting to move where. Change one thing at a time; `classic-ppo compare`"
        "\ndoes it over seeds. This page is generated from the rules: `make docs`.\n\n"
        f"| what stands out | healthy | what it means | try |\n|---|---|---|---|\n{rows}\n"
    )


if __name__ == "__main__":
    print(tuning_page(), end="")
