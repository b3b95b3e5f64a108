"""The folder of a run: settings, metrics and samples as JSON, written so that a crash loses nothing already there."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_ppo.runtime.checkpoint import list_checkpoints
from rlhf_ppo.runtime.files import read_json, replace_text, sync_file
from rlhf_ppo.runtime.metrics import require_known_metrics

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

LOCK_FILE = "run.lock"


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _row(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return json.loads(line.decode())
    except ValueError as error:
        raise ValueError(f"{file}, line {number}, is damaged ({error}): mend or remove that line") from None


def _position(name: str, row: Mapping[str, Any]) -> tuple[int, bool]:
    """Where a row of the file ``name`` belongs: its iteration, and whether it is part of the evaluation after it."""
    evaluation = name.startswith("eval") or any(key.startswith("eval/") for key in row)
    return row.get("progress/iteration", row.get("iteration", 0)), evaluation


def read_run(folder: str | Path) -> dict[str, Any]:
    """The settings in a run's folder (run.json), or {} if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    file = Path(folder) / "run.json"
    return read_json(file, "put the run's settings back, or remove it") if file.is_file() else {}


class RunDirectory:
    """One run's folder. Starting a run where another one lies moves the old files to ``previous-<n>/`` first."""

    def __init__(self, path: str | Path, *, quiet: bool = True) -> None:
        """Make the folder if it is not there.

        Args:
            path: of the folder.
            quiet: say nothing when files move into ``previous-<n>/``.
        Raises:
            ValueError: the path is a file, or the folder cannot be made.
        """
        self.path, self.quiet = Path(path), quiet
        self.listener: Callable[[Mapping[str, float]], None] | None = None
        """Told of each line of metrics.jsonl once it is written (see :mod:`rlhf_ppo.runtime.trackers`)."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir {self.path} is a file; name a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir {self.path} cannot be made: {error.strerror}") from None

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin a run: set an earlier run's files aside, then write ``run.json``."""
        if (self.path / "metrics.jsonl").exists() or any(self.path.glob("checkpoint-*")):
            # Checkpoints go first: if this is cut off, no later run takes what is left for its own.
            entries = [entry for entry in self.path.iterdir() if not entry.name.startswith(("previous-", LOCK_FILE))]
            self.set_aside(
                sorted(entries, key=lambda entry: not entry.name.startswith("checkpoint-")), "an earlier run"
            )
        self.write_json("run.json", settings)

    def set_aside(self, entries: Sequence[Path], what: str) -> None:
        """Move files and folders of this folder, which are ``what``, into a new ``previous-<n>/``."""
        if not entries:
            return
        n = 1
        while (self.path / f"previous-{n}").exists():
            n += 1
        old = self.path / f"previous-{n}"
        old.mkdir()
        for entry in entries:
            entry.rename(old / entry.name)
        if not self.quiet:
            print(f"{what} in {self.path} is now in {old}")

    def go_on(self, checkpoint: Path, iteration: int, settings: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this run, or of one in another folder, whose history comes along.

        Args:
            checkpoint: its folder, ``checkpoint-<iteration>``.
            iteration: where the run is now.
            settings: of the run from here on, for ``run.json``.
        """
        if checkpoint.parent.resolve() == self.path.resolve():
            # What came after the checkpoint, or is damaged, is no part of this run any more.
            later = [f for f in list_checkpoints(self.path) if int(f.name.rpartition("-")[2]) > iteration]
            self.set_aside(later, "what came after the checkpoint")
        else:
            self.start(settings)
            for file in checkpoint.parent.glob("*.jsonl"):
                shutil.copyfile(file, self.path / file.name)
        self.rewind(iteration)
        self.write_json("run.json", settings)

    def rewind(self, iteration: int) -> None:
        """Go on in this folder after ``iteration``: rows of later iterations leave its JSONL files.

        So do those of an evaluation after ``iteration`` itself: it opens the next one and is made again.
        """
        for file in self.path.glob("*.jsonl"):
            rows = [row for row in self.read(file.name) if _position(file.name, row) <= (iteration, False)]
            replace_text(file, "".join(_line(row) for row in rows))

    def sync(self) -> None:
        """Bring the JSONL files to the disk."""
        for file in self.path.glob("*.jsonl"):
            sync_file(file)

    def write_json(self, name: str, content: Any) -> Path:
        """Write one JSON file."""
        file = self.path / name
        replace_text(file, json.dumps(content, indent=2, default=str) + "\n")
        return file

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one line to a JSONL file."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append a line to ``metrics.jsonl``; a misspelt key is a KeyError (see :func:`require_known_metrics`)."""
        require_known_metrics(metrics)
        # Numbers of numpy's and torch's come from callbacks.
        metrics = {name: x if isinstance(x, (int, float)) else float(x) for name, x in metrics.items()}
        self.append("metrics.jsonl", metrics)
        if self.listener is not None:
            self.listener(metrics)

    def read(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The rows of a JSONL file; none if it does not exist. A last line that a kill cut off is no row.

        Raises:
            ValueError: another line is damaged.
        """
        file = self.path / name
        if not file.exists():
            return []
        # Not splitlines(): a model may write U+2028 or U+0085, which end a line there but not in a JSON line.
        whole, _, _ = file.read_bytes().rpartition(b"\n")
        return [_row(file, number, line) for number, line in enumerate(whole.split(b"\n"), start=1) if line]


class RunLockedError(ValueError):
    """Another run is writing into the folder."""


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Hold a run's folder while this lasts. The file stays; what counts is the system's lock on it.

    Where the system has no such locks nothing is held: on a network file system with a warning.

    Raises:
        RunLockedError: another run holds it; names its process.
    """
    if fcntl is None:
        yield
        return
    file = Path(folder) / LOCK_FILE
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise RunLockedError(
                f"{folder} is in use by another run (process {holder}): wait for it, stop it, or name another "
                "output_dir"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{file} cannot be locked ({error.strerror}): make sure that no other run writes here", stacklevel=3
            )
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
