"""Read a run's folder as it is: finished, running, resumed, half written or damaged; what cannot be read is said."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rlhf_ppo.runtime.diagnosis.symptoms import RunMetrics
from rlhf_ppo.runtime.logs.run_directory import is_locked
from rlhf_ppo.runtime.logs.tables import read_table, table_numbers

Row = Mapping[str, Any]
OF_THE_MACHINE = ("output_dir", "quiet", "report", "record_tokens_every", "report_to", "versions", "origin")
"""What is in run.json and does not change what is learned."""


X_LABELS = {
    "progress/env_steps": "environment steps",
    "progress/episodes": "responses trained on",
    "progress/optimizer_steps": "optimizer steps",
    "progress/iteration": "updates",
}
"""Metrics that may be on the horizontal axis, the first that a run has."""


@dataclass
class RunFiles:
    """What a run's folder holds."""

    path: Path
    facts: dict[str, Any]
    """run.json; {} without one."""
    updates: list[dict[str, float]]
    """A row of finite numbers for each update."""
    evaluations: list[dict[str, float]]
    samples: list[dict[str, Any]]
    eval_samples: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    watch: list[dict[str, Any]]
    """What it was warned of while it ran."""
    running: bool
    """Whether a process is writing into the folder now."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, in sentences."""

    @property
    def name(self) -> str:
        """The folder's name, as people call the run."""
        return self.path.resolve().name

    @cached_property
    def kind(self) -> Literal["language", "control"]:
        """Which frontend wrote it."""
        control = "env_id" in self.facts or any("progress/env_steps" in row for row in self.updates)
        return "control" if control else "language"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings alone."""
        nested = self.facts.get("args")
        return (
            dict(nested) if isinstance(nested, dict) else {k: x for k, x in self.facts.items() if k != "fingerprints"}
        )

    @cached_property
    def x_key(self) -> str:
        """The metric on the horizontal axis."""
        return next((key for key in X_LABELS if any(key in row for row in self.updates)), "progress/iteration")

    @property
    def x_label(self) -> str:
        """What that is."""
        return X_LABELS[self.x_key]

    @cached_property
    def metrics(self) -> RunMetrics:
        """The updates as symptoms are looked for in them."""
        return RunMetrics(self.updates, {**self.settings, "fingerprints": _mapping(self.facts.get("fingerprints"))})

    def points(self, key: str) -> list[tuple[float, float]]:
        """Return (x, value) of a metric, from updates or evaluations."""
        rows, x = self.evaluations if key.startswith("eval/") else self.updates, self.x_key
        return [(row[x], row[key]) for row in rows if key in row and x in row]

    def last(self, key: str) -> float | None:
        """Return the last value of a metric."""
        points = self.points(key)
        return points[-1][1] if points else None

    @cached_property
    def planned(self) -> tuple[float, float] | None:
        """How much of what was planned is done, as (done, planned) in units of the horizontal axis."""
        whole = self.settings.get("total_timesteps" if self.kind == "control" else "total_episodes")
        done = self.updates[-1].get(self.x_key) if self.updates else 0.0
        return (done, float(whole)) if isinstance(whole, (int, float)) and whole > 0 and done is not None else None

    @property
    def finished(self) -> bool:
        """Whether everything planned is done, as far as the folder says."""
        return self.planned is None or self.planned[0] >= self.planned[1]

    def table(self, name: str, number: int) -> dict[str, list[Any]] | None:
        """Read a recorded rollout's rows; None, and a problem, if they are damaged."""
        try:
            return read_table(self.path, name, number)
        except (ValueError, ModuleNotFoundError) as error:
            self.problems.append(f"{_sentence(error)}; it is left out.")
            return None

    def recorded(self, name: str) -> list[int]:
        """List the rollouts that a table has."""
        return table_numbers(self.path, name)


def read_run_files(folder: str | Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: name a run's folder, which holds metrics.jsonl")
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "run.json")):
        inside = sorted(file.parent.name for file in folder.glob("*/metrics.jsonl"))[:3]
        hint = f", such as {folder / inside[0]}" if inside else ", which holds metrics.jsonl"
        raise FileNotFoundError(f"{folder} holds no run: name a run's folder{hint}")
    problems: list[str] = []
    lines = {
        name: _lines(folder / f"{name}.jsonl", problems) for name in ("samples", "eval_samples", "timings", "watch")
    }
    rows = [_numbers(row) for row in _lines(folder / "metrics.jsonl", problems)]
    placed = [row for row in rows if any(key in row for key in X_LABELS)]
    return RunFiles(
        path=folder,
        facts=_facts(folder / "run.json", problems),
        updates=[row for row in placed if not any(key.startswith("eval/") for key in row)],
        evaluations=[row for row in placed if any(key.startswith("eval/") for key in row)],
        **{name: [row for row in found if isinstance(row.get("iteration"), int)] for name, found in lines.items()},
        running=is_locked(folder),
        problems=problems,
    )


def _lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Read a JSONL file; damaged lines are left out and counted. A last line cut off by a kill is no damage."""
    if not file.is_file():
        return []
    # Not splitlines(): a model may write U+2028 or U+0085, which end a line there but not in a JSON line.
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    rows, damaged = [], []
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
            rows.append(row)
        except (ValueError, RecursionError):
            damaged.append(number)
    if damaged:
        lines = f"line {damaged[0]} is" if len(damaged) == 1 else f"{len(damaged)} lines (the first: {damaged[0]}) are"
        problems.append(f"{file.name}: {lines} damaged and left out.")
    return rows


def _facts(file: Path, problems: list[str]) -> dict[str, Any]:
    if not file.is_file():
        problems.append("There is no run.json: the settings are unknown.")
        return {}
    try:
        facts = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        problems.append("run.json is damaged: the settings are unknown.")
        return {}
    return facts


def _numbers(row: Row) -> dict[str, float]:
    return {
        key: x
        for key, x in row.items()
        if isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e300 and math.isfinite(x)
    }


def _mapping(x: Any) -> dict[str, Any]:
    return x if isinstance(x, dict) else {}


def _sentence(error: Exception) -> str:
    return str(error).rstrip(".")


def setting_differences(runs: Sequence[RunFiles], ignored: Sequence[str] = OF_THE_MACHINE) -> dict[str, list[Any]]:
    """Return the settings in which runs differ -> the value of each; None where a run does not have it."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in ignored)
    rows = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}
