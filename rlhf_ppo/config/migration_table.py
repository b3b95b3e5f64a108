"""Other projects' names: what every argument of their PPO becomes here, read from one table."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parents[1] / "assets" / "migration-table.txt"

SOURCES = {
    "trl": "TRL 1.12",
    "trl-0x": "TRL 0.11",
    "llama-factory": "LLaMA-Factory 0.9",
    "ms-swift": "ms-swift 4",
}
"""Project in the table -> its name in messages and pages, with the version that was read."""

FATES = {
    "same": "the same value under our name",
    "converted": "has a counterpart with another unit, meaning or default: the note says how it is converted",
    "automatic": "needs no setting here",
    "ignored": "their PPO accepts it but never uses it; nothing is lost",
    "unsupported": "their PPO uses it, and no setting here does",
}


class Row(NamedTuple):
    """What becomes of some arguments of some projects."""

    sources: tuple[str, ...]
    """The projects, of ``SOURCES``."""
    names: tuple[str, ...]
    """The arguments, which share the rest of the row; a project may lack some of them."""
    fate: str
    """One of ``FATES``."""
    ours: tuple[str, ...]
    """Settings of `rlhf-ppo train` that replace them, or come nearest."""
    note: str


def read_table() -> list[Row]:
    """Read the table's rows."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    cells = ([part.strip() for part in line.split("|")] for line in lines)
    return [
        Row(tuple(sources.split()), tuple(names.split()), fate, tuple(ours.split()), note)
        for sources, names, fate, ours, note in cells
    ]


ROWS = read_table()
"""All rows of the table."""


@cache
def rows_of(source: str) -> dict[str, Row]:
    """Return a project's rows: argument -> its row."""
    return {name: row for row in ROWS if source in row.sources for name in row.names}
