"""Signals: Ctrl-C and SIGTERM stop a run at its next safe point, after a save; a second one stops it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Signals are delivered to the process, so these are global.
_heard: list[int] = []
_deferring: list[bool] = []
_listening = False
_announces = True
_also: list[Callable[[], None]] = []


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run at a safe point; ``saved`` is the checkpoint to resume from, once written."""

    def __init__(self, number: int, saved: Path | None = None) -> None:
        self.number, self.saved = number, saved
        super().__init__(number, saved)

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"stopped by {name}" + ("" if self.saved is None else f"; saved in {self.saved}")

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, by the shells' convention: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


def asked_to_stop() -> bool:
    """Whether a signal has arrived since :func:`stop_on_signals` began."""
    return bool(_heard)


def stop_if_asked() -> None:
    """Raise :class:`Interrupted` if a signal has arrived; marks a safe point.

    At a safe point stopping loses nothing that cannot be repeated: between two tokens of a rollout, while waiting
    for a reward, after an update; never inside an update.
    """
    for check in _also:
        check()
    if _heard and not _deferring:
        raise Interrupted(_heard[0])


def stopping_if_asked(result: Result) -> Result:
    """Return a result, with a safe point before: of work that is done, where stopping inside was not possible."""
    stop_if_asked()
    return result


def also_stop_if(check: Callable[[], None]) -> None:
    """Call ``check`` at each safe point from now on; what it raises stops the run there."""
    _also.append(check)


def heard() -> int | None:
    """Return the number of the signal that has arrived since :func:`stop_on_signals` began."""
    return _heard[0] if _heard else None


def hear(number: int) -> None:
    """Stop at the next safe point, like another process that a signal has reached."""
    if _listening and not _heard:
        _heard.append(number)


def announce_by_itself(on: bool) -> None:
    """Choose whether a signal is announced as it arrives; if not, :func:`announce` does so."""
    global _announces
    _announces = on


def announce(number: int) -> None:
    """Say that a signal has arrived, and what happens now."""
    name = signal.Signals(number).name
    # Not print(): the signal may arrive in the middle of one.
    os.write(2, f"\n{name}: the run stops at the next safe point and saves; again: at once, unsaved\n".encode())


@contextmanager
def deferring_stops() -> Iterator[None]:
    """Let nothing inside be a safe point: other processes compute together with this one."""
    _deferring.append(True)
    try:
        yield
    finally:
        _deferring.pop()


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Record the first SIGINT or SIGTERM during the block, for the next :func:`stop_if_asked`.

    That first signal restores the earlier handlers, so that a second one takes effect at once; so does the end of the
    block. Ignored signals (``nohup``, a shell's background jobs) stay ignored. Outside the main thread, where Python
    does not handle signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    # None: a handler that was not installed from Python, which could not be restored.
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}

    def restore_handlers() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        restore_handlers()
        _heard.append(number)
        if _announces:
            announce(number)

    global _listening
    _heard.clear()
    _listening = True
    try:
        for number in before:
            signal.signal(number, note)
        yield
    finally:
        restore_handlers()
        _listening = False
        _heard.clear()
