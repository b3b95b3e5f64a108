"""Rows: a data set's rows as they were given, whatever they hold; lists stay Python, Arrow tables stay on disk."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from datasets import Dataset, IterableDataset, interleave_datasets

from rlhf_ppo.data.chat import is_chat

ROW_NAME = "__row_name__"
"""A column of this name says what messages call each row; it is no column of the data."""


@dataclass(frozen=True)
class Rows:
    """Rows of one data set, or of several together.

    A row in Python keeps its own keys, kinds and objects, at every depth; only a column that other rows have and it has
    not is None. What is handed out is a copy of lists and dicts, so that nobody can change the data set by it.
    """

    parts: tuple[Dataset | list[dict[str, Any]], ...]
    places: Sequence[tuple[int, int]]
    """The part that each row is in, and its number there."""
    columns: Mapping[str, str]
    """Name of each column -> its name in the parts."""
    names: Sequence[str]
    """What messages call each row: "prompts.jsonl row 3", whatever was mixed, shuffled or set aside since."""

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
        """One row by its number, or one column by its name."""
        if isinstance(key, str):
            return [row[key] for row in self._read(self.places, {key: self.columns[key]})]
        return self._read([self.places[key]], self.columns)[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), 1000):
            yield from self._read(self.places[start : start + 1000], self.columns)

    def to_list(self) -> list[dict[str, Any]]:
        """All rows."""
        return list(self)

    def select(self, indices: Iterable[int]) -> Rows:
        """The rows with these numbers, in this order."""
        chosen = list(indices)
        return replace(self, places=[self.places[i] for i in chosen], names=[self.names[i] for i in chosen])

    def rename_column(self, old: str, new: str) -> Rows:
        """The rows with one column under another name."""
        return replace(self, columns={new if name == old else name: own for name, own in self.columns.items()})

    def train_test_split(self, test_size: int, *, seed: int) -> dict[str, Rows]:
        """The rows in two parts, ``train`` and ``test``, drawn as ``datasets`` draws them."""
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
                # A transform of the user's may read other columns than it gives.
                whole = part.format["type"] == "custom"
                table: Any = (part if whole else part.select_columns([*columns.values()]))[[i for _, i in wanted]]
                for row, (k, _) in enumerate(wanted):
                    found[k] = {name: _chat_without_blanks(table[own][row]) for name, own in columns.items()}
        return found


RowSource = Rows | Dataset | Sequence[Mapping[str, Any]]
"""What a data set may be given as."""


def as_rows(rows: RowSource, name: str = "") -> Rows:
    """``name``'s rows from a ``datasets.Dataset`` or a list of mappings.

    Raises:
        ValueError: it is neither, or a row's keys are no text; says which.
    """
    if isinstance(rows, Rows):
        return rows
    where = f"{name} " if name else ""
    if isinstance(rows, Mapping):
        raise ValueError(f"{name} holds the splits {list(rows)}: pass one of them, such as dataset['train']")
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
    """All rows of the parts, one part after the other; they have the same columns, in any order."""
    sources: list[Any] = []
    places: list[tuple[int, int]] = []
    for part in parts:
        places += [(len(sources) + number, i) for number, i in part.places]
        sources += part.parts
    return Rows(tuple(sources), places, parts[0].columns, [name for part in parts for name in part.names])


def interleave(parts: Sequence[Rows], probabilities: Sequence[float], seed: int) -> Rows:
    """Rows drawn from the parts with these probabilities, none twice, until one part is used up."""
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    numbers = [_numbers(range(start, start + len(part))) for start, part in zip(starts, parts, strict=True)]
    order = interleave_datasets(numbers, list(probabilities), seed=seed, stopping_strategy="first_exhausted")
    return join(parts).select(order["number"])


def require_column(rows: Rows, column: str) -> None:
    """Raise a ValueError that lists the columns and the closest match unless ``column`` is there."""
    if column in rows.column_names:
        return
    close = difflib.get_close_matches(column, rows.column_names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"the data set has no column {column!r}, its columns are {rows.column_names}{hint}")


def prompt_rows(rows: Rows, column: str) -> Rows:
    """The rows with ``column`` under the name "prompt".

    Raises:
        ValueError: there is no such column, or another one is called "prompt" already.
    """
    require_column(rows, column)
    if column == "prompt":
        return rows
    if "prompt" in rows.column_names:
        raise ValueError(f"the data set has a column 'prompt' beside prompt_column={column!r}: rename one of them")
    return rows.rename_column(column, "prompt")


def _numbers(numbers: range) -> Dataset:
    """Row numbers as a data set: what ``datasets`` does to their order, it would do to the rows'."""
    return Dataset.from_dict({"number": list(numbers)})


def _copy(value: Any) -> Any:
    """A copy of lists, tuples and dicts at every depth; other objects are the very ones that were given."""
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copy, value))
    return value


def _chat_without_blanks(value: Any) -> Any:
    """A chat without what Arrow puts into every message: the keys of all the others, with None."""
    if not is_chat(value):
        return value
    kept = ("role", "content")
    return [{k: _without_none(x) for k, x in message.items() if x is not None or k in kept} for message in value]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
