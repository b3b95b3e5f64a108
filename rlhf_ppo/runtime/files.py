"""Write files atomically: to a temporary name, fsynced, then renamed, so that a kill leaves none half written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

TEMPORARY = ".tmp-"
"""Prefix of the names of unfinished files and folders."""


@contextmanager
def replacing_files(folder: str | Path, *, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those in ``folder`` atomically at the end.

    If the block raises, nothing is replaced. Other files in ``folder`` stay.

    Args:
        folder: where the files go; created if missing.
        needed: about how many bytes they take.
    Raises:
        OSError: the disk lacks space, or a file could not be written.
    """
    folder = Path(folder)
    temporary = folder / f"{TEMPORARY}files"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        require_space(folder, needed)
        yield temporary
        new = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
        for file in new:
            follow_umask(file)
            sync_file(file)
        for file in new:
            place = folder / file.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    except (OSError, SafetensorError) as error:  # a full disk raises either
        why = getattr(error, "strerror", None) or error
        raise OSError(getattr(error, "errno", None) or errno.EIO, f"{folder} cannot be written: {why}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_or_rescue(folder: str | Path, write: Callable[[Path], object], *, needed: int) -> None:
    """Call ``write`` to write the files of a folder; if that fails, save them in the system's temporary folder.

    Args:
        folder, needed: see :func:`replacing_files`.
        write: writes the files into the folder that it is given.
    Raises:
        OSError: they could not be written to ``folder``; says where they are instead.
    """
    try:
        with replacing_files(folder, needed=needed) as new:
            write(new)
    except OSError as error:
        elsewhere = tempfile.mkdtemp(prefix="rlhf-ppo-model-")
        try:
            with replacing_files(elsewhere, needed=needed) as new:
                write(new)
        except OSError as failure:
            raise OSError(error.errno, f"{error.strerror}. Saving elsewhere failed, too: {failure.strerror}") from error
        raise OSError(error.errno, f"{error.strerror}. The files were saved in {elsewhere} instead") from error


def require_space(folder: str | Path, needed: int, what: str = "it") -> None:
    """Raise an OSError that begins with ``what`` if a folder's disk has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{what} needs {needed / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB free")


def follow_umask(file: Path) -> None:
    """Give a file its folder's read and write permissions, which follow the umask; safetensors writes 0600."""
    if os.name == "posix":
        file.chmod(file.parent.stat().st_mode & 0o666)


def replace_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = file.with_name(f"{TEMPORARY}{file.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def json_line(row: Any) -> str:
    """Return a line of a JSONL file; half a character, which UTF-8 cannot hold, is escaped as JSON does."""
    return json.dumps(row, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode() + "\n"


def plain_json(value: Any) -> Any:
    """Return a value as JSON gives it back: numbers and arrays of other libraries as numbers and lists.

    What JSON does not know becomes text, and half a character, which no tokenizer takes, a question mark.

    Raises:
        ValueError: it cannot be written as JSON, such as a list that holds itself.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return json.loads(text.encode(errors="replace"))


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Read the object in a JSON file.

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
    """Fsync a file."""
    with file.open("r+b") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that its renames are on the disk."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
