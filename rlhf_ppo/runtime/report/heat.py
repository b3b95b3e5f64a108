"""The heat view: a response token by token, or an episode step by step, coloured by one of its numbers."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf_ppo.runtime.explain import Explanation
from rlhf_ppo.runtime.report.axes import short
from rlhf_ppo.runtime.report.run_files import RunFiles
from rlhf_ppo.runtime.report.samples import facts, read_text, whole_rows


class Quantity(NamedTuple):
    """A number to colour by."""

    name: str
    label: str
    meaning: str
    centre: float = 0.0
    """The value without colour."""


QUANTITIES = (
    Quantity("advantage", "Advantage", "how much better it turned out than expected; raises or lowers its probability"),
    Quantity("reward", "Reward", "its share of the score, minus what its KL cost"),
    Quantity("kl", "KL", "log-prob minus the reference's, in nats"),
    Quantity("value", "Value", "what the critic expected before it"),
    Quantity("ratio", "Ratio", "its probability after the update over that before it", 1.0),
    Quantity("clipped", "Clipped", "outside the clip range after the update; struck out where it has no gradient left"),
)
READ = ("reward", "kl", "value", "delta", "advantage", "weight", "ratio", "logprob", "entropy")
"""Numbers that are read out for a token."""
LONGEST = 600
"""Tokens of a response that are shown."""


class Cell(NamedTuple):
    """A token as the page shows it."""

    text: str
    heat: float
    """-1 to 1, of the first quantity."""
    gap: bool
    """Tokens that the policy did not choose come before it."""
    clipped: str
    alive: bool


@dataclass(frozen=True)
class HeatView:
    """One response."""

    title: str
    prompt: str | None
    facts: str
    cells: list[Cell]
    quantities: list[Quantity]
    """Those that it has."""
    data: str
    """As JSON: names of the numbers, a row of them per token, heats per quantity."""
    cut: int = 0
    """Tokens that are left out."""


class Told(NamedTuple):
    """What a view is made of."""

    rows: Sequence[Mapping[str, Any]]
    """Per token: ``text``, ``position``, any of the numbers in READ, ``clipped``, ``gradient_alive``, ``ended``."""
    title: str
    prompt: str | None = None
    """What came before it."""
    facts: str = ""
    """Its numbers in a line."""


def make_views(told: Sequence[Told]) -> list[HeatView]:
    """Make the views of some responses; one colour is the same number in all of them."""
    shown = [row for one in told for row in one.rows[:LONGEST]]
    scales = {quantity.name: _scale(shown, quantity) for quantity in QUANTITIES}
    return [_make_view(one, scales) for one in told]


def _make_view(told: Told, scales: Mapping[str, float]) -> HeatView:
    shown = told.rows[:LONGEST]
    present = [q for q in QUANTITIES if any(row.get(q.name) not in (None, "") for row in shown)]
    heats = {q.name: [_heat(row, q, scales[q.name]) for row in shown] for q in present}
    first = heats[present[0].name] if present else [0.0] * len(shown)
    positions = [int(row["position"]) for row in shown]
    cells = [
        Cell(
            str(row["text"]),
            first[i],
            i > 0 and positions[i] != positions[i - 1] + 1,
            str(row.get("clipped") or ""),
            row.get("gradient_alive") is not False,
        )
        for i, row in enumerate(shown)
    ]
    names = [name for name in READ if any(row.get(name) is not None for row in shown)]
    ends = [str(row.get("ended") or "") for row in shown]
    data = {
        "names": names,
        "rows": [[_said(row.get(name)) for name in names] for row in shown],
        "heats": heats,
        "positions": positions,
        "ends": ends if any(ends) else [],
    }
    numbers, cut = json.dumps(data, separators=(",", ":")), len(told.rows) - len(shown)
    return HeatView(told.title, told.prompt, told.facts, cells, present, numbers, cut)


def explained_rows(explanation: Explanation, sequence: int, *, quoted: bool) -> list[dict[str, Any]]:
    """Return the rows of one sequence of an explanation as a view takes them.

    Args:
        explanation: of either frontend.
        sequence: which.
        quoted: labels are quoted texts, as a language model's are.
    """
    rows = explanation.of(sequence).rows
    texts = [ast.literal_eval(row["label"]) if quoted else f"{row['label']} " for row in rows]
    return [{**row, "text": text, "position": row["step"]} for row, text in zip(rows, texts, strict=True)]


def recorded_views(run: RunFiles, *, every: bool) -> list[HeatView]:
    """Return views of what a run recorded.

    Args:
        run: the run.
        every: of its first, its middle and its last rollout; False: of the last alone.
    """
    told: list[Told] = []
    recorded = run.recorded("tokens")
    chosen = [recorded[0], recorded[len(recorded) // 2], recorded[-1]] if recorded and every else recorded[-1:]
    for number in sorted(set(chosen), reverse=True):  # what it does in the end comes first
        if (columns := run.table("tokens", number)) is not None:
            told += _told_of_rollout(run, number, columns)[: 2 if number == chosen[-1] and every else 1]
    recorded = run.recorded("steps")
    if recorded and (columns := run.table("steps", recorded[-1])) is not None:
        told += _told_of_steps(recorded[-1], columns)[: 3 if every else 1]
    return make_views(told)


def _told_of_rollout(run: RunFiles, number: int, columns: dict[str, list[Any]]) -> list[Told]:
    samples = [row for row in whole_rows(run.samples) if row["iteration"] == number]
    told = []
    for response, rows in split_rows(columns, "response").items():
        known = samples[response] if isinstance(response, int) and 0 <= response < len(samples) else None
        prompt = None if known is None else read_text(known["prompt"])
        told.append(Told(rows, f"Rollout {number}, response {response}", prompt, "" if known is None else facts(known)))
    return told


def _told_of_steps(number: int, columns: dict[str, list[Any]]) -> list[Told]:
    return [
        Told(
            [{**row, "text": f"{row['action']} ", "position": row["step"]} for row in rows],
            f"Rollout {number}, copy {copy}",
        )
        for copy, rows in split_rows(columns, "copy").items()
    ]


def split_rows(columns: Mapping[str, list[Any]], by: str) -> dict[Any, list[dict[str, Any]]]:
    """Return the rows of a table, by the value in one of its columns."""
    names = list(columns)
    found: dict[Any, list[dict[str, Any]]] = {}
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(names, values, strict=True))
        found.setdefault(row[by], []).append(row)
    return found


def _scale(rows: Sequence[Mapping[str, Any]], quantity: Quantity) -> float:
    """Return the distance from the centre that 95 % of the tokens stay within: there the colour is full."""
    far = sorted(abs(x) for row in rows if (x := _distance(row, quantity)) is not None)
    return (far[min(int(0.95 * len(far)), len(far) - 1)] or far[-1] or 1.0) if far else 1.0


def _heat(row: Mapping[str, Any], quantity: Quantity, scale: float) -> float:
    """Return a token's colour, from -1 to 1."""
    if quantity.name == "clipped":
        return {"above": 1.0, "below": -1.0}.get(str(row.get("clipped")), 0.0)
    distance = _distance(row, quantity)
    return 0.0 if distance is None else round(max(-1.0, min(1.0, distance / scale)), 2)


def _distance(row: Mapping[str, Any], quantity: Quantity) -> float | None:
    x = row.get(quantity.name)
    return x - quantity.centre if isinstance(x, (int, float)) and math.isfinite(x) else None


def _said(x: Any) -> str:
    return short(float(x)) if isinstance(x, (int, float)) else "-"
