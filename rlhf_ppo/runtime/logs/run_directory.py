"""The folder of a run: its settings, metrics and samples as JSON, and the lock that keeps other runs out of it."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rlhf_ppo.runtime.checkpoints.checkpoint import list_checkpoints
from rlhf_ppo.runtime.files import json_line, read_json, replace_text, sync_file
from rlhf_ppo.runtime.logs.lines import LOGGER
from rlhf_ppo.runtime.logs.metrics import require_known_metrics
from rlhf_ppo.runtime.logs.tables import TABLES, copy_tables, rewind_tables
from rlhf_ppo.runtime.processes.group import ALONE, ProcessGroup
from rlhf_ppo.runtime.texts import display_text

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

LOCK_FILE = "run.lock"
SERVED_FOLDER = "vllm-policy"
"""Folder in a run's from which a vLLM server reads the policy; it stays where it is as long as the server may."""


def append_line(file: Path, row: Mapping[str, Any]) -> None:
    """Append one line to a JSONL file."""
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json_line(row))


def _row(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return json.loads(line.decode())
    except ValueError as error:
        raise ValueError(f"{file}, line {number}, is damaged ({error}): repair or remove that line") from None


def _position(name: str, row: Mapping[str, Any]) -> tuple[int, bool]:
    """Return a row's iteration, and whether it is of the evaluation after it; ``name``: its file."""
    evaluation = name.startswith("eval") or any(key.startswith("eval/") for key in row)
    return row.get("progress/iteration", row.get("iteration", 0)), evaluation


def read_run(folder: str | Path) -> dict[str, Any]:
    """Read the settings in a run's folder (run.json); {} without one.

    Raises:
        ValueError: the file is damaged.
    """
    file = Path(folder) / "run.json"
    return read_json(file, "restore the run's settings, or remove it") if file.is_file() else {}


class RunDirectory:
    """One run's folder. Starting a run in the folder of another moves the old files to ``previous-<n>/`` first."""

    def __init__(self, path: str | Path, *, quiet: bool = True, writes: bool = True) -> None:
        """Create the folder if it is missing.

        Args:
            path: the folder.
            quiet: do not print that files move into ``previous-<n>/``.
            writes: False for a process that leaves all writing to the first one: its calls then write nothing.
        Raises:
            ValueError: the path is a file, or the folder cannot be created.
        """
        self.path, self.quiet, self.writes = Path(path), quiet, writes
        self.listener: Callable[[Mapping[str, float]], None] | None = None
        """Called with each line of metrics.jsonl after it is written (see :mod:`rlhf_ppo.runtime.logs.trackers`)."""
        self.samples_listener: Callable[[str, Sequence[Mapping[str, Any]], int], None] | None = None
        """Called with samples after they are written: the file's name without its suffix, the rows, the step."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir {self.path} is a file: name a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir {self.path} cannot be created: {error.strerror}") from None

    def start(self, settings: Mapping[str, Any]) -> None:
        """Start a run: move an earlier run's files aside, then write ``run.json``."""
        if not self.writes:
            return
        if any(any(self.path.glob(name)) for name in ("metrics.jsonl", "checkpoint-*", "rollouts", *TABLES)):
            # Checkpoints go first: if this is interrupted, no later run takes the rest for its own.
            entries = [
                entry
                for entry in self.path.iterdir()
                if not entry.name.startswith(("previous-", LOCK_FILE, SERVED_FOLDER))
            ]
            self.set_aside(
                sorted(entries, key=lambda entry: not entry.name.startswith("checkpoint-")), "an earlier run"
            )
        self.write_json("run.json", settings)

    def set_aside(self, entries: Sequence[Path], what: str) -> None:
        """Move files and folders, described by ``what``, into a new ``previous-<n>/``."""
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
            LOGGER.info("%s in %s is now in %s", what, self.path, old)

    def continue_from(self, checkpoint: Path, iteration: int, settings: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of this run, or of a run in another folder, whose history is copied.

        Args:
            checkpoint: its folder, ``checkpoint-<iteration>``.
            iteration: where the run is now.
            settings: of the run from here on, for ``run.json``.
        """
        if not self.writes:
            return
        if checkpoint.parent.resolve() == self.path.resolve():
            # Later or damaged checkpoints are no longer part of this run.
            later = [f for f in list_checkpoints(self.path) if int(f.name.rpartition("-")[2]) > iteration]
            self.set_aside(later, "what came after the checkpoint")
        else:
            self.start(settings)
            for file in checkpoint.parent.glob("*.jsonl"):
                shutil.copyfile(file, self.path / file.name)
            copy_tables(checkpoint.parent, self.path)
        self.rewind(iteration)
        self.write_json("run.json", settings)

    def rewind(self, iteration: int) -> None:
        """Remove the rows of later iterations than ``iteration`` from the JSONL files and the tables.

        Those of the evaluation after ``iteration`` go, too: it belongs to the next one and is repeated.
        """
        if not self.writes:
            return
        for file in self.path.glob("*.jsonl"):
            rows = [row for row in self.read(file.name) if _position(file.name, row) <= (iteration, False)]
            replace_text(file, "".join(map(json_line, rows)))
        rewind_tables(self.path, iteration)

    def sync(self) -> None:
        """Fsync the JSONL files."""
        for file in self.path.glob("*.jsonl"):
            sync_file(file)

    def write_json(self, name: str, content: Any) -> Path:
        """Write one JSON file."""
        file = self.path / name
        replace_text(file, json.dumps(content, indent=2, default=str) + "\n")
        return file

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one line to a JSONL file."""
        if self.writes:
            append_line(self.path / name, row)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append a line to ``metrics.jsonl``; raises a KeyError for an unknown key of a built-in family."""
        require_known_metrics(metrics)
        if not self.writes:
            return
        # Callbacks may log scalars of numpy and torch.
        metrics = {name: x if isinstance(x, (int, float)) else float(x) for name, x in metrics.items()}
        self.append("metrics.jsonl", metrics)
        if self.listener is not None:
            self.listener(metrics)

    def log_samples(self, name: str, rows: Sequence[Mapping[str, Any]], *, iteration: int, step: int) -> None:
        """Append samples to a JSONL file.

        Args:
            name: the file's.
            rows: one per sample.
            iteration: goes into each row.
            step: where trackers show them.
        """
        for row in rows:
            self.append(name, {"iteration": iteration, **row})
        if rows and self.samples_listener is not None:
            shown = [{**row, **{x: display_text(row[x]) for x in ("prompt", "completion")}} for row in rows]
            self.samples_listener(name.removesuffix(".jsonl"), shown, step)

    def read(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """Read the rows of a JSONL file; [] if it does not exist. A last line cut off by a kill is dropped.

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
def run_lock(folder: str | Path, processes: ProcessGroup = ALONE) -> Iterator[None]:
    """Lock a run's folder during the block. The operating system releases the lock however the process ends.

    The first of several processes holds it for all. The file stays; only the lock on it counts. Where locks are not
    available there is none; on a network file system, this warns.

    Raises:
        RunLockedError: another run holds the lock; names its process.
    """
    with ExitStack() as lock:
        processes.on_first(lambda: lock.enter_context(_lock(folder)))
        yield


def is_locked(folder: str | Path) -> bool:
    """Whether a run holds the lock of a folder: it is still writing there."""
    file = Path(folder) / LOCK_FILE
    if fcntl is None or not file.is_file():
        return False
    try:
        with file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # another's file, or no locks here
        return False
    return False


@contextmanager
def _lock(folder: str | Path) -> Iterator[None]:
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
                f"{file} cannot be locked ({error.strerror}): make sure that no other run writes here", stacklevel=7
            )
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
