"""Send metrics and samples to TensorBoard, W&B or Trackio as well; a tracker that fails never stops the run."""

from __future__ import annotations

import html
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rlhf_ppo.runtime.logs.run_directory import RunDirectory

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Names of trackers: each is the package that it needs, and an extra of this package."""

FINISH_S = 60.0
"""Seconds that a run waits at most, at its end, for its trackers to finish sending."""

_STEPS = ("progress/episodes", "progress/env_steps", "progress/optimizer_steps")
_ONE_AT_A_TIME = threading.Lock()


def check_trackers(names: Sequence[str]) -> None:
    """Raise a ValueError unless the setting ``report_to`` holds known names, each once."""
    if isinstance(names, str) or not all(name in TRACKERS for name in names) or len(set(names)) < len(names):
        raise ValueError(f"report_to must be a tuple of different names of {', '.join(TRACKERS)}, got {names!r}")


def require_installed(names: Sequence[str]) -> None:
    """Raise a ModuleNotFoundError with the install command if a tracker's package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"report_to={name!r} needs a missing package: pip install 'rlhf-ppo[{name}]'")


@contextmanager
def reporting(run: RunDirectory, names: Sequence[str], *, project: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Send what ``run.log`` and ``run.log_samples`` write to trackers, too, during the block.

    Each tracker has a thread of its own, so that the run never waits for it. One that fails is dropped with one
    warning; one that hangs is abandoned at the end.

    Args:
        run: the run's folder; TensorBoard's files go into its folder ``tensorboard``.
        names: some of :data:`TRACKERS`.
        project: where W&B and Trackio list the run, under its folder's name.
        settings: the run's.
    """
    workers = [_Worker(name, partial(_start, name, run.path, project, settings)) for name in names]

    def log(metrics: Mapping[str, float]) -> None:
        for worker in workers:
            worker.lines.put(dict(metrics))
            worker.warn()

    def log_samples(name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        for worker in workers:
            worker.lines.put(Samples.of(name, rows, step))

    run.listener, run.samples_listener = log, log_samples
    try:
        yield
    finally:
        run.listener = run.samples_listener = None
        for worker in workers:
            worker.lines.put(None)
        deadline = time.monotonic() + FINISH_S
        for worker in workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))
            worker.warn(ended=True)


class Samples(NamedTuple):
    """A table of samples, as trackers show them."""

    name: str
    columns: list[str]
    cells: list[list[float | str | None]]
    """[rows][columns]: numbers, text, or None."""
    step: int

    @classmethod
    def of(cls, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> Samples:
        """Make a table of rows, which may have different columns; in a column with text all values are text."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        by_column = [_cells([row.get(column) for row in rows]) for column in columns]
        return cls(name, columns, [list(cells) for cells in zip(*by_column, strict=True)], step)

    def markdown(self) -> str:
        """Return the table as Markdown, in which a cell is one line."""
        lines = [self.columns, ["---"] * len(self.columns), *([_one_line(x) for x in row] for row in self.cells)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(values: Sequence[Any]) -> list[float | str | None]:
    numeric = all(value is None or isinstance(value, (bool, int, float)) for value in values)
    return [
        None if value is None else float(value) if numeric else value if isinstance(value, str) else json.dumps(value)
        for value in values
    ]


def _one_line(cell: float | str | None) -> str:
    if cell is None:
        return ""
    text = cell if isinstance(cell, str) else f"{cell:.4g}"
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", "<br>")


def log_samples(name: str, tracker: Any, samples: Samples) -> None:
    """Show a table in one of :data:`TRACKERS`: as a table, in TensorBoard as text."""
    if name == "tensorboard":
        tracker.writer.add_text(samples.name, samples.markdown(), samples.step)
        return
    table = import_module(name).Table(columns=samples.columns, data=samples.cells)
    tracker.log({samples.name: table}, step=samples.step)


class _Worker:
    """A tracker in a thread: started, given what is put into ``lines``, and finished by None."""

    def __init__(self, name: str, start: Callable[[], Any]) -> None:
        self.name, self._start = name, start
        self.lines: SimpleQueue[dict[str, float] | Samples | None] = SimpleQueue()
        self._problem: str | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        doing = "start"
        try:
            tracker = self._start()
            doing = "log"
            while (line := self.lines.get()) is not None:
                if isinstance(line, Samples):
                    log_samples(self.name, tracker, line)
                else:
                    tracker.log(line, step=next((int(line[key]) for key in _STEPS if key in line), None))
            doing = "finish"
            tracker.finish()
        except Exception as error:
            self._problem = f"failed to {doing} ({type(error).__name__}: {error})"

    def warn(self, *, ended: bool = False) -> None:
        """Warn once of a failure, in the run's own thread, where a warning is seen and can be made an error."""
        if (problem := self._problem) is not None:
            self._problem = None
        elif ended and self.thread.is_alive():
            problem = f"did not finish within {FINISH_S:g} seconds after the run"
        if problem is not None:
            warnings.warn(
                f"tracker {self.name!r} {problem}; the run continues without it, and metrics.jsonl is complete",
                stacklevel=2,
            )


def _start(name: str, folder: Path, project: str, settings: Mapping[str, Any]) -> Any:
    from accelerate import PartialState, tracking

    with _ONE_AT_A_TIME:
        PartialState()  # accelerate's own logger asks for it
    if name == "tensorboard":
        tracker: Any = tracking.TensorBoardTracker("tensorboard", logging_dir=str(folder))
    else:
        kind = tracking.WandBTracker if name == "wandb" else tracking.TrackioTracker
        plain = {key: value if isinstance(value, (int, float)) else str(value) for key, value in settings.items()}
        options = {"dir": str(folder)} if name == "wandb" else {}
        tracker = kind(project, name=folder.resolve().name, config=plain, **options)
    tracker.start()
    return tracker
