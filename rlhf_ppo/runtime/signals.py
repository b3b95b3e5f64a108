"""Signals: Ctrl-C and SIGTERM end a run at its next safe point, after an orderly save; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# A signal belongs to the process, so what was heard is the process's, too.
_heard: list[int] = []


class Interrupted(KeyboardInterrupt):
    """A signal ended a run at a safe point; ``saved`` is where the run can go on from, once it lies there."""

    def __init__(self, number: int, saved: Path | None = None) -> None:
        self.number, self.saved = number, saved
        super().__init__(number, saved)

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"stopped by {name}" + ("" if self.saved is None else f"; saved in {self.saved}")

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


def asked_to_stop() -> bool:
    """Whether a signal has come since :func:`stop_on_signals` began."""
    return bool(_heard)


def stop_if_asked() -> None:
    """A safe point: raises :class:`Interrupted` if :func:`asked_to_stop`.

    It stands where nothing is half done, or only what can be made again: between two tokens of a rollout, while a
    reward is waited for, after an update; never inside an update.
    """
    if _heard:
        raise Interrupted(_heard[0])


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """While this lasts, the first SIGINT or SIGTERM is only noted, for the next :func:`stop_if_asked`.

    The handlers that were there before come back with that first signal, so that the second one does at once what it
    always did; and at the end, whatever happened. Signals that are ignored (``nohup``, a shell's background jobs) stay
    ignored. Python handles signals in the main thread alone; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    # None is a handler that was not installed from Python: it could not be put back.
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        put_back()
        _heard.append(number)
        name = signal.Signals(number).name
        # Not print(): the signal may have come in the middle of one.
        os.write(2, f"\n{name}: the run stops at the next safe point and saves; again: at once, unsaved\n".encode())

    _heard.clear()
    try:
        for number in before:
            signal.signal(number, note)
        yield
    finally:
        put_back()
        _heard.clear()
