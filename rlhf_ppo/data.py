"""Data: where rows come from, what a prompt may be, and how prompts become token ids."""

from __future__ import annotations

import difflib
from pathlib import Path

from datasets import Dataset, load_dataset

Prompt = str | list[dict[str, str]]

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_rows(source: str, split: str = "train") -> Dataset:
    """One split of a data set: a csv, json(l) or parquet file (``.gz`` too), a folder of these, or a hub id.

    Raises:
        FileNotFoundError: ``source`` looks like a path and is not there.
        ValueError: the file's ending names no known format, or the data set is empty.
    """
    path = Path(source)
    if path.is_file():
        ending = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
        if ending not in _FORMATS:
            raise ValueError(f"{source}: unknown ending {ending!r}; use one of {sorted(_FORMATS)} (also with .gz)")
        rows = load_dataset(_FORMATS[ending], data_files=str(path), split="train")
    elif path.exists():
        rows = load_dataset(str(path), split=split)
    elif path.suffix in {*_FORMATS, ".gz"} or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data file {source} does not exist (working folder: {Path.cwd()})")
    else:
        rows = load_dataset(source, split=split)
    if len(rows) == 0:
        raise ValueError(f"data set {source} has no rows")
    return rows


def require_column(rows: Dataset, column: str) -> None:
    """Raise a ValueError that lists the columns and the closest match unless ``column`` is there."""
    if column in rows.column_names:
        return
    close = difflib.get_close_matches(column, rows.column_names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"the data set has no column {column!r}, its columns are {rows.column_names}{hint}")
