"""Trackers: metrics.jsonl's lines sent to TensorBoard, W&B or Trackio as well; none of them can stop a run."""

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
    from rlhf_ppo.runtime.run_directory import RunDirectory

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Names of trackers; each is the package that it needs, and an extra of this one."""

FINISH_S = 60.0
"""Longest time in seconds that a run waits at its end for what a tracker still has to send."""

_STEPS = ("progress/episodes", "progress/env_steps")
_ONE_AT_A_TIME = threading.Lock()


def check_trackers(names: Sequence[str]) -> None:
    """Raise a ValueError unless the setting ``report_to`` is known names, each once."""
    if isinstance(names, str) or not all(name in TRACKERS for name in names) or len(set(names)) < len(names):
        raise ValueError(f"report_to must be a tuple of different names of {', '.join(TRACKERS)}, got {names!r}")


def require_installed(names: Sequence[str]) -> None:
    """Raise a ModuleNotFoundError that says what to install if a tracker's package is not there."""
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"report_to={name!r} needs a package: pip install 'rlhf-ppo[{name}]'")


@contextmanager
def reporting(run: RunDirectory, names: Sequence[str], *, project: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """What ``run.log`` writes goes to trackers, too, until the end of the block.

    Each tracker works in a thread of its own, so that the run waits for none. One that fails, at its start or later, is
    left out from then on with one warning; one that hangs is left behind at the end.

    Args:
        run: the run's folder; TensorBoard's files go into its folder ``tensorboard``.
        names: of :data:`TRACKERS`.
        project: under which W&B and Trackio list the run; it is named after its folder.
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
    """A tracker in its thread: started, given each line that is put into ``lines``, and finished at None."""

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
        """Say once what went wrong, in the run's own thread, where a warning can be seen and made an error."""
        if (problem := self._problem) is not None:
            self._problem = None
        elif ended and self.thread.is_alive():
            problem = f"was not done within {FINISH_S:g} seconds of the run's end"
        if problem is not None:
            warnings.warn(
                f"tracker {self.name!r} {problem}; the run goes on without it, and metrics.jsonl has every line",
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
