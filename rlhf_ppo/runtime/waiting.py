"""Waiting for code of the user's own that may hang: a call gets a thread, a time limit, and is left behind after it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from rlhf_ppo.runtime.signals import stop_if_asked

FAILURES = (Exception, SystemExit, asyncio.CancelledError)
"""What code of the user's own may raise and fail with: sys.exit() in it must not end a run as if it had succeeded."""

_LOOK_UP_S = 0.25
"""Seconds between two looks for a signal while a call is waited for."""


def start(call: Callable[[], Any], timeout_s: float | None) -> Future[Any]:
    """Run ``call`` in a daemon thread: if it hangs, it can be left behind and cannot keep the process from ending.

    Without a time limit it runs here and now.
    """
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    if timeout_s is None:
        run()
    else:
        threading.Thread(target=run, daemon=True).start()
    return future


def has_ended(future: Future[Any], wait_s: float | None) -> bool:
    """Wait, at most ``wait_s`` seconds, looking up now and then for a signal that asks the run to stop.

    Waiting and asking for the result are kept apart, because the call may raise a TimeoutError of its own.
    """
    end = None if wait_s is None else time.monotonic() + wait_s
    while True:
        left = _LOOK_UP_S if end is None else min(_LOOK_UP_S, max(0.0, end - time.monotonic()))
        done = concurrent.futures.wait([future], timeout=left).done
        # Before the result: Ctrl-C also ends the processes that a reward has started, which looks like a failure.
        stop_if_asked()
        if done:
            return True
        if end is not None and time.monotonic() >= end:
            return False
