"""TRL's names: what every argument of TRL 1.12's PPO becomes here, read from one table."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parents[1] / "assets" / "trl-1.12-ppo-table.txt"

FATES = {
    "same": "the same value under our name",
    "converted": "has a counterpart with another unit, meaning or default: the note says how it is converted",
    "automatic": "needs no setting here",
    "ignored": "TRL's PPO accepts it but never uses it; nothing is lost",
    "unsupported": "TRL's PPO uses it, and no setting here does",
}


class Row(NamedTuple):
    """What becomes of some of TRL's arguments."""

    names: tuple[str, ...]
    """The arguments, which share the rest of the row."""
    fate: str
    """One of ``FATES``."""
    ours: tuple[str, ...]
    """Settings of `rlhf-ppo train` that replace them, or come nearest."""
    note: str


def read_table() -> dict[str, list[Row]]:
    """Read the table: TRL's class -> its rows."""
    tables: dict[str, list[Row]] = {}
    rows: list[Row] = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            rows = tables[line.strip("[]")] = []
        elif not line.startswith("#"):
            names, fate, ours, note = (part.strip() for part in line.split("|"))
            rows.append(Row(tuple(names.split()), fate, tuple(ours.split()), note))
    return tables


CLASSES = read_table()
"""TRL's class -> rows of the table."""

ROWS: dict[str, Row] = {name: row for rows in CLASSES.values() for row in rows for name in row.names}
"""TRL's argument -> its row: TRL's parser takes the three classes as one list of flags."""
