"""Trackers: metrics.jsonl's lines sent to TensorBoard, W&B or Trackio as well; none of them can stop a run."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_ppo.runtime.run_directory import RunDirectory

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Names of trackers; each is the package that it needs, and an extra of this one."""

FINISH_S = 60.0
"""Longest time in seconds that a tracker may take over its last uploads."""

_STEPS = ("progress/episodes", "progress/env_steps")


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

    A tracker that fails, at its start or later, is left out from then on with one warning.

    Args:
        run: the run's folder; TensorBoard's files go into its folder ``tensorboard``.
        names: of :data:`TRACKERS`.
        project: under which W&B and Trackio list the run; it is named after its folder.
        settings: the run's.
    """
    alive: dict[str, Any] = {}
    for name in names:
        tracker = _guarded(name, "start", lambda n=name: _start(n, run.path, project, settings))
        if tracker is not None:
            alive[name] = tracker

    def log(metrics: Mapping[str, float]) -> None:
        step = next((int(metrics[key]) for key in _STEPS if key in metrics), None)
        for name, tracker in list(alive.items()):
            if _guarded(name, "log", lambda t=tracker: (t.log(dict(metrics), step=step), True)) is None:
                del alive[name]

    run.listener = log
    try:
        yield
    finally:
        run.listener = None
        for name, tracker in alive.items():
            _finish(name, tracker)


def _start(name: str, folder: Path, project: str, settings: Mapping[str, Any]) -> Any:
    from accelerate import PartialState, tracking

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


def _guarded(name: str, what: str, call: Callable[[], Any]) -> Any:
    """The call's result; None, and a warning, if it raised."""
    try:
        return call()
    except Exception as error:
        _warn(name, f"failed to {what} ({type(error).__name__}: {error})")
        return None


def _warn(name: str, problem: str) -> None:
    warnings.warn(
        f"tracker {name!r} {problem}; the run goes on without it, and metrics.jsonl has every line", stacklevel=2
    )


def _finish(name: str, tracker: Any) -> None:
    """Send what is left, for a bounded time: a tracker that is out of reach may try again and again."""
    failed: list[Exception] = []

    def finish() -> None:
        try:
            tracker.finish()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    thread.join(FINISH_S)
    if thread.is_alive():
        _warn(name, f"was not done within {FINISH_S:g} seconds of the run's end")
    elif failed:
        _warn(name, f"failed to finish ({type(failed[0]).__name__}: {failed[0]})")
