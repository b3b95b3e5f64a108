"""Send metrics to TensorBoard, W&B or Trackio as well; a tracker that fails never stops the run."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_ppo.runtime.logs.run_directory import RunDirectory

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Names of trackers: each is the package that it needs, and an extra of this package."""

FINISH_S = 60.0
"""Seconds that a run waits at most, at its end, for its trackers to finish sending."""

_STEPS = ("progress/episodes", "progress/env_steps")
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
    """Send what ``run.log`` writes to trackers, too, during the block.

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

    run.listener = log
    try:
        yield
    finally:
        run.listener = None
        for worker in workers:
            worker.lines.put(None)
        deadline = time.monotonic() + FINISH_S
        for worker in workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))
            worker.warn(ended=True)


class _Worker:
    """A tracker in a thread: started, given each line that is put into ``lines``, and finished by None."""

    def __init__(self, name: str, start: Callable[[], Any]) -> None:
        self.name, self._start = name, start
        self.lines: SimpleQueue[dict[str, float] | None] = SimpleQueue()
        self._problem: str | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        doing = "start"
        try:
            tracker = self._start()
            doing = "log"
            while (metrics := self.lines.get()) is not None:
                tracker.log(metrics, step=next((int(metrics[key]) for key in _STEPS if key in metrics), None))
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
