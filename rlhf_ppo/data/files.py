"""Load rows from csv, json(l) and parquet files, folders of them, and the hub."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from datasets import ReadInstruction, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError

from rlhf_ppo.data import reasoning_gym
from rlhf_ppo.data.hub import explain_load_failure
from rlhf_ppo.data.rows import Rows, as_rows

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_ENDINGS = tuple(ending + gz for ending in _FORMATS for gz in ("", ".gz"))


def load_rows(source: str, split: str = "train") -> Rows:
    """Load one split of a data set: a csv, json(l) or parquet file (``.gz`` too), a folder of them, or a hub id.

    "reasoning-gym:TASK" makes the rows (see :func:`rlhf_ppo.data.reasoning_gym.named_rows`).

    A single file is the split "train"; part of a split is written as in ``datasets``, such as "train[:100]". Rows of
    json(l) files stay plain Python: each keeps its own keys and types, at every depth.

    Raises:
        FileNotFoundError: ``source`` looks like a path and is not there.
        ValueError: an unknown file format, no such split, an unreadable file, a column that occurs twice, or no rows.
    """
    path = Path(source).expanduser()
    if path.is_file():
        ending = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
        if ending not in _FORMATS:
            raise ValueError(f"{source}: unknown ending {ending!r}; use one of {sorted(_FORMATS)} (also with .gz)")
        if path.stat().st_size == 0:
            raise ValueError(f"data set {source} has no rows")
        if any(name != "train" for name in _split_names(split)):
            raise ValueError(
                f"split={split!r}: {source} is a single file, which has no splits: leave split out, or name the file "
                "with these rows"
            )
        kind = _FORMATS[ending]
        rows = _read(source, kind, kind, split, {"train": [str(path)]}, data_files=str(path))
    elif path.exists():
        builder = _explained(source, load_dataset_builder, str(path))
        files = {str(name): list(map(str, found)) for name, found in (builder.config.data_files or {}).items()}
        rows = _read(source, type(builder).__module__.rpartition(".")[2], str(path), split, files)
    elif path.suffix in {*_FORMATS, ".gz"} or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data file {source} does not exist (working folder: {Path.cwd()})")
    elif source.startswith(reasoning_gym.PREFIX):
        rows = as_rows(_explained(source, _split_rows, {"train": reasoning_gym.named_rows(source)}, split))
    else:
        rows = as_rows(_explained(source, load_dataset, source, split=split))
    if len(rows) == 0:
        raise ValueError(f"data set {source} has no rows")
    return rows


def _read(source: str, kind: str, name: str, split: str, files: dict[str, list[str]], **options: Any) -> Rows:
    """Read local files: json(l) as plain Python, everything else with ``datasets``."""
    named = [part for part in _split_names(split) if part in files]
    readable = all(file.endswith(_ENDINGS) for part in named for file in files[part])
    if kind == "csv" and readable:
        for file in (file for part in named for file in files[part]):
            _explained(source, _require_different_columns, file)
    if kind == "json" and readable and named == _split_names(split):
        parts = {part: [_explained(source, _json_rows, file) for file in files[part]] for part in named}
        if all(rows is not None for found in parts.values() for rows in found):
            whole = {part: [row for rows in found for row in rows] for part, found in parts.items()}
            return as_rows(_explained(source, _split_rows, whole, split))
    return as_rows(_explained(source, load_dataset, name, split=split, **options))


def _explained(source: str, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call ``read``; turn an error in the data into one line with the data set's name."""
    try:
        return read(*args, **options)
    except DatasetGenerationError as error:  # its cause names the error in the file
        raise ValueError(f"data set {source} cannot be read: {_reason(error.__cause__ or error)}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"data set {source} cannot be read: {_reason(error)}") from error
    except (OSError, RuntimeError, ValueError) as error:
        if "corresponds to no data" in str(error):  # a csv with only a header
            raise ValueError(f"data set {source} has no rows in split {options.get('split')!r}") from None
        local = Path(source).expanduser().exists() or isinstance(error, ValueError)
        reason = _reason(error) if local else explain_load_failure(source, error, kind="dataset")
        raise ValueError(f"data set {source} cannot be read: {reason}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
        return f"the gzip file is cut off or damaged ({error}), copy or download it again"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text ({error})"
    return (str(error).splitlines() or [""])[0]


# Splits


def _split_names(split: str) -> list[str]:
    """Return the splits in "train[:100]+test": train, test."""
    return [part.split("[")[0].strip() for part in split.split("+")]


def _split_rows(parts: dict[str, list[dict[str, Any]]], split: str) -> list[dict[str, Any]]:
    lengths = {name: len(rows) for name, rows in parts.items()}
    chosen = cast(Any, ReadInstruction.from_spec(split).to_absolute(lengths))
    return [row for piece in chosen for row in parts[piece.splitname][piece.from_ : piece.to]]


# Files


def _open(file: str, **options: Any) -> TextIO:
    opener: Any = gzip.open if file.endswith(".gz") else open
    return opener(file, "rt", encoding="utf-8-sig", **options)


def _json_rows(file: str) -> list[dict[str, Any]] | None:
    """Read JSON lines, or one list of objects; None if the file is neither, such as a table by columns.

    Raises:
        ValueError: invalid JSON, or a key that occurs twice in an object; names the line.
    """
    with _open(file) as lines:
        numbered = ((n, line) for n, line in enumerate(lines, start=1) if line.strip())
        first = next(numbered, (0, ""))
        if first[1].lstrip().startswith("["):
            listed = _parsed(first[1] + lines.read(), first[0])
            return listed if isinstance(listed, list) and all(isinstance(row, dict) for row in listed) else None
        rows: list[dict[str, Any]] = []
        for number, line in (first, *numbered) if first[1] else ():
            try:
                row = _parsed(line, number)
            except json.JSONDecodeError as error:
                if number == first[0]:  # one object over many lines
                    return None
                raise ValueError(f"JSON parse error in line {number} ({error.msg})") from None
            if not isinstance(row, dict):
                raise ValueError(f"JSON parse error in line {number}: a row must be an object, got {line.strip():.80}")
            rows.append(row)
        return rows


def _parsed(text: str, line: int) -> Any:
    def without_doubles(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"line {line} has the key {double!r} twice in one object: rename or remove one of them")
        return found

    return json.loads(text, object_pairs_hook=without_doubles)


def _require_different_columns(file: str) -> None:
    with _open(file, newline="") as lines:
        header: Iterator[list[str]] = (row for row in csv.reader(lines) if row)
        names = [name for name in next(header, []) if name]
    if double := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the column {double[0]!r} occurs twice: rename or remove one of them")
