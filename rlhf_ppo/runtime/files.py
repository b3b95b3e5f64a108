"""Files that a kill cannot leave half written: made beside their place, brought to the disk, then renamed over it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
"""What every unfinished file or folder's name begins with."""


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """A temporary folder whose files replace those of the same names in ``folder``, each as a whole, at the end.

    If what happens inside raises, nothing is replaced. Other files in ``folder`` stay.
    """
    folder = Path(folder)
    temporary = folder / f"{TEMPORARY}files"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        new = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
        for file in new:
            sync_file(file)
        for file in new:
            place = folder / file.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_text(file: Path, text: str) -> None:
    """Write a text file as a whole."""
    temporary = file.with_name(f"{TEMPORARY}{file.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is damaged; names the file, and ends with ``remedy``.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged (it holds a {type(content).__name__}, not an object): {remedy}")
    return content


def sync_file(file: Path) -> None:
    """Bring a file's content to the disk."""
    with file.open("r+b") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, and renames are the system's to order
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
