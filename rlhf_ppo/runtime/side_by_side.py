"""Side by side: calls of user code, each in a thread of its own, with what it awaits on one event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any

from rlhf_ppo.runtime.machine.signals import stop_if_asked

_POLL_S = 0.25
"""Seconds between two checks for a signal and for time limits while waiting for calls."""

_here = threading.local()
"""``call``: the call that this thread runs."""


class Call:
    """A call of user code; ``future`` has its result once it has ended."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.future: Future[Any] = Future()
        self.began: float | None = None
        """When it left the queue, on the monotonic clock."""
        self.awaiting: Future[Any] | None = None
        """What it waits for on the event loop."""

    def cancel(self) -> None:
        """Cancel what the call awaits; a plain function cannot be stopped, and is abandoned in its thread."""
        if self.awaiting is not None:
            self.awaiting.cancel()


class CallTimeoutError(Exception):
    """A call did not end in time."""

    def __init__(self, call: Call) -> None:
        super().__init__("a call did not end in time")
        self.call = call


class Calls:
    """Calls that run at the same time, at most ``at_once`` of them; the others wait, and begin in order.

    As one ends the next one begins, whatever the thread that made them is doing meanwhile.
    """

    def __init__(self, at_once: int | None = None, timeout_s: float | None = None) -> None:
        """Set the limits.

        Args:
            at_once: at most so many run; None: all.
            timeout_s: seconds that one may take, counted from its beginning; None: no limit.
        """
        self.at_once, self.timeout_s = at_once, timeout_s
        self._lock = threading.Lock()
        self._queue: deque[Call] = deque()
        self._running: set[Call] = set()

    def start(self, run: Callable[[], Any]) -> Call:
        """Start a call, or queue it. What ``run`` returns is its result; an awaitable is awaited."""
        call = Call(run)
        with self._lock:
            self._queue.append(call)
        self._begin()
        return call

    def ended(self, calls: Sequence[Call], patience_s: float) -> list[Call]:
        """Wait until one of these calls ends, then ``patience_s`` seconds at most for the others.

        Returns:
            Those that have ended, in the order given; their futures may hold errors.
        Raises:
            CallTimeoutError: one did not end within ``timeout_s``.
            Interrupted: a signal arrived.
        """
        end: float | None = None
        while True:
            wait_s = self._time_to_limit() if end is None else min(_POLL_S, max(0.0, end - time.monotonic()))
            whole = concurrent.futures.FIRST_COMPLETED if end is None else concurrent.futures.ALL_COMPLETED
            concurrent.futures.wait([call.future for call in calls], timeout=wait_s, return_when=whole)
            # Checked first: Ctrl-C also ends processes that user code has started, which would look like its failure.
            stop_if_asked()
            done = [call for call in calls if call.future.done()]
            now = time.monotonic()
            for call in calls:
                if self.timeout_s is None or call.began is None or now - call.began < self.timeout_s:
                    continue
                if not call.future.done():
                    raise CallTimeoutError(call)
            end = now + patience_s if done and end is None else end
            if len(done) == len(calls) or (end is not None and now >= end):
                return done

    def abandon(self) -> None:
        """Begin no further call, cancel what the running ones await, and forget about them."""
        with self._lock:
            self._queue.clear()
            running = list(self._running)
        for call in running:
            call.cancel()

    def _time_to_limit(self) -> float:
        """Return how long to wait before the next look."""
        with self._lock:
            began = min((call.began for call in self._running if call.began is not None), default=None)
        if self.timeout_s is None or began is None:
            return _POLL_S
        return min(_POLL_S, max(0.001, began + self.timeout_s - time.monotonic()))

    def _begin(self) -> None:
        """Begin queued calls while there is room."""
        with self._lock:
            while self._queue and (self.at_once is None or len(self._running) < self.at_once):
                call = self._queue.popleft()
                self._running.add(call)
                call.began = time.monotonic()
                # A daemon thread does not keep the process alive if the call hangs.
                threading.Thread(target=self._run, args=(call,), daemon=True).start()

    def _run(self, call: Call) -> None:
        _here.call = call
        result, error = None, None
        try:
            result = settled(call.run())
        except BaseException as raised:  # even an exit: it belongs to the caller
            error = raised
        with self._lock:
            self._running.discard(call)
        # The next one begins before the result is known, so that whoever waits for all sees none missing.
        self._begin()
        if error is None:
            call.future.set_result(result)
        else:
            call.future.set_exception(error)


def settled(value: Any) -> Any:
    """Return a value; if it is awaitable, what it gives on the event loop. Not for code that runs on this loop."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    future = asyncio.run_coroutine_threadsafe(wait(), event_loop())
    call: Call | None = getattr(_here, "call", None)
    if call is not None:
        call.awaiting = future
    return future.result()


def event_loop() -> asyncio.AbstractEventLoop:
    """Return the process's one loop for user code, so that clients which belong to a loop survive from call to call."""
    with _one_loop:
        return _running_loop()


_one_loop = threading.Lock()


@cache
def _running_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop
