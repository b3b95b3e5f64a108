"""Rows: a data set's rows with their own keys and types; lists stay plain Python, Arrow tables stay on disk."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from datasets import Dataset, IterableDataset, interleave_datasets

from rlhf_ppo.data.chat import is_chat

ROW_NAME = "__row_name__"
"""A column of this name holds each row's name in messages; it is not part of the data."""


@dataclass(frozen=True)
class Rows:
    """Rows of one or several data sets.

    A plain Python row keeps its own keys, types and objects, at every depth; only a missing column is None. Lists and
    dicts are returned as copies, so that the data set cannot be modified.
    """

    parts: tuple[Dataset | list[dict[str, Any]], ...]
    places: Sequence[tuple[int, int]]
    """The part of each row, and its number there."""
    columns: Mapping[str, str]
    """Name of each column -> its name in the parts."""
    names: Sequence[str]
    """Each row's name in messages, "prompts.jsonl row 3", through mixing, shuffling and splitting."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self.columns)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    def __getitem__(self, key: str | int) -> Any:
        """Return one row by its number, or one column by its name."""
        if isinstance(key, str):
            return [row[key] for row in self._read(self.places, {key: self.columns[key]})]
        return self._read([self.places[key]], self.columns)[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), 1000):
            yield from self._read(self.places[start : start + 1000], self.columns)

    def to_list(self) -> list[dict[str, Any]]:
        """Return all rows."""
        return list(self)

    def select(self, indices: Iterable[int]) -> Rows:
        """Return the rows with these numbers, in this order."""
        chosen = list(indices)
        return replace(self, places=[self.places[i] for i in chosen], names=[self.names[i] for i in chosen])

    def rename_column(self, old: str, new: str) -> Rows:
        """Rename one column."""
        return replace(self, columns={new if name == old else name: own for name, own in self.columns.items()})

    def train_test_split(self, test_size: int, *, seed: int) -> dict[str, Rows]:
        """Split the rows into ``train`` and ``test``, as ``datasets`` does."""
        parts = _numbers(range(len(self))).train_test_split(test_size, seed=seed)
        return {str(name): self.select(part["number"]) for name, part in parts.items()}

    def _read(self, places: Sequence[tuple[int, int]], columns: Mapping[str, str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{} for _ in places]
        for number, part in enumerate(self.parts):
            wanted = [(k, i) for k, (p, i) in enumerate(places) if p == number]
            if not isinstance(part, Dataset):
                for k, i in wanted:
                    found[k] = {name: _copy(part[i].get(own)) for name, own in columns.items()}
            elif wanted:
                # A user's transform may read other columns than it returns.
                whole = part.format["type"] == "custom"
                table: Any = (part if whole else part.select_columns([*columns.values()]))[[i for _, i in wanted]]
                for row, (k, _) in enumerate(wanted):
                    found[k] = {name: _chat_without_blanks(table[own][row]) for name, own in columns.items()}
        return found


RowSource = Rows | Dataset | Sequence[Mapping[str, Any]]
"""The types of a data set."""


def as_rows(rows: RowSource, name: str = "") -> Rows:
    """Convert a ``datasets.Dataset`` or a list of mappings to rows; ``name`` is the data set's.

    Raises:
        ValueError: another type, or keys that are not text; says which.
    """
    if isinstance(rows, Rows):
        return rows
    where = f"{name} " if name else ""
    if isinstance(rows, Mapping):
        raise ValueError(f"{name} has the splits {list(rows)}: pass one of them, such as dataset['train']")
    if isinstance(rows, Dataset):
        part, columns = rows, rows.column_names
        given = list(rows[ROW_NAME]) if ROW_NAME in columns else [None] * len(rows)
    else:
        unsized = isinstance(rows, (str, IterableDataset))
        listed: list[Any] = [] if unsized else list(rows)
        if unsized or not all(isinstance(row, Mapping) for row in listed):
            raise ValueError(
                f"{name} must be a data set of known length or a list of mappings with a key 'prompt', "
                f"got {type(rows).__name__}"
            )
        part = [dict(row) for row in listed]
        columns = list(dict.fromkeys(key for row in part for key in row))
        if other := [key for key in columns if not isinstance(key, str)]:
            raise ValueError(f"the names of {name}'s columns must be text, got {other[0]!r}")
        given = [row.get(ROW_NAME) for row in part]
    names = [row_name or f"{where}row {i}" for i, row_name in enumerate(given)]
    return Rows((part,), [(0, i) for i in range(len(part))], {c: c for c in columns if c != ROW_NAME}, names)


def join(parts: Sequence[Rows]) -> Rows:
    """Concatenate parts that have the same columns, in any order."""
    sources: list[Any] = []
    places: list[tuple[int, int]] = []
    for part in parts:
        places += [(len(sources) + number, i) for number, i in part.places]
        sources += part.parts
    return Rows(tuple(sources), places, parts[0].columns, [name for part in parts for name in part.names])


def interleave(parts: Sequence[Rows], probabilities: Sequence[float], seed: int) -> Rows:
    """Draw rows from the parts with these probabilities, without replacement, until one part is exhausted."""
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    numbers = [_numbers(range(start, start + len(part))) for start, part in zip(starts, parts, strict=True)]
    order = interleave_datasets(numbers, list(probabilities), seed=seed, stopping_strategy="first_exhausted")
    return join(parts).select(order["number"])


def require_column(rows: Rows, column: str) -> None:
    """Raise a ValueError with the columns and the closest match if ``column`` is missing."""
    if column in rows.column_names:
        return
    close = difflib.get_close_matches(column, rows.column_names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"the data set has no column {column!r}, its columns are {rows.column_names}{hint}")


def prompt_rows(rows: Rows, column: str, *, required: bool = True) -> Rows:
    """Rename ``column`` to "prompt".

    Args:
        required: False: an environment may say the prompts, so that rows without a column "prompt" do.
    Raises:
        ValueError: no such column, or another one is already called "prompt".
    """
    if column == "prompt" and not required:
        return rows
    require_column(rows, column)
    if column == "prompt":
        return rows
    if "prompt" in rows.column_names:
        raise ValueError(f"the data set has a column 'prompt' beside prompt_column={column!r}: rename one of them")
    return rows.rename_column(column, "prompt")


def _numbers(numbers: range) -> Dataset:
    """Make a data set of row numbers, whose order ``datasets`` changes as it would the rows'."""
    return Dataset.from_dict({"number": list(numbers)})


def _copy(value: Any) -> Any:
    """Copy lists, tuples and dicts at every depth; other objects are shared."""
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copy, value))
    return value


def _chat_without_blanks(value: Any) -> Any:
    """Remove from a chat what Arrow adds to each message: the keys of all others, with None."""
    if not is_chat(value):
        return value
    kept = ("role", "content")
    return [{k: _without_none(x) for k, x in message.items() if x is not None or k in kept} for message in value]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
