"""Call reward functions: time limits, and async functions concurrently."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from rlhf_ppo.rewards.functions import RewardFunction
from rlhf_ppo.rewards.validation import result_of
from rlhf_ppo.runtime.command_line.user_code import start
from rlhf_ppo.runtime.side_by_side import event_loop


def call_rewards(
    calls: Mapping[str, tuple[RewardFunction, tuple[Any, ...], Mapping[str, Any]]], timeout_s: float | None = None
) -> dict[str, Any]:
    """Call reward functions: async ones concurrently, sync ones one after another meanwhile.

    Args:
        calls: name -> function, positional and keyword arguments.
        timeout_s: time limit of each call in seconds; a call that exceeds it is abandoned.
    Returns:
        Name -> what the function returned.
    Raises:
        RewardError: a function raised (the cause, with its traceback, is chained) or exceeded the limit.
    """
    began = time.monotonic()
    running = {name: _start_async(*call) for name, call in calls.items() if is_async(call[0])}
    results: dict[str, Any] = {}
    try:
        for name, (function, args, keywords) in calls.items():
            if name not in running:
                future = start(partial(function, *args, **keywords), timeout_s)
                results[name] = result_of(future, name, timeout_s, timeout_s)
        for name, (future, _) in running.items():
            left = None if timeout_s is None else max(0.0, began + timeout_s - time.monotonic())
            results[name] = result_of(future, name, left, timeout_s)
    finally:
        for _, cancel in running.values():
            cancel()
    return {name: results[name] for name in calls}


def is_async(function: RewardFunction) -> bool:
    """Return whether a call must be awaited: an ``async def``, or an object whose ``__call__`` is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _start_async(
    function: RewardFunction, args: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[Future[Any], Callable[[], bool]]:
    """Start a call on the event loop of all async rewards; return its future and a function that cancels it."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    async def run() -> None:
        try:
            future.set_result(await function(*args, **keywords))
        except BaseException as error:  # even an interrupt: it belongs to the caller and must not end the loop
            future.set_exception(error)

    return future, asyncio.run_coroutine_threadsafe(run(), event_loop()).cancel
