"""Calling reward functions: what their signatures take, time limits, and async ones side by side."""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from rlhf_ppo.runtime.user_code import FAILURES, has_ended, start

RewardFunction = Callable[..., Any]
"""``fn(prompts, completions, completion_ids=..., **columns)``, sync or async: one score per completion, in their order.
``completion_ids`` (the sampled token ids) is passed to functions that name it or take ``**`` anything; after several
turns ``conversations`` (all messages) and ``completion_turns`` (the turn of each token) to those that name them."""

RESERVED = ("prompts", "completions", "completion_ids", "conversations", "completion_turns")
"""Names that reward functions receive anyway, so that no column of a data set may have them."""


class RewardError(RuntimeError):
    """A reward function failed, hung, or returned what is no list of scores."""


@dataclass(frozen=True)
class StepRewards:
    """A process reward: scores for the steps of one completion, each placed on the token that completes the step."""

    steps: Sequence[tuple[int, float] | tuple[int, int, float]]
    """(end of the step as a character offset in the completion, exclusive; its score). After several turns
    (number of the turn, from 0; end in what the policy said in it; score)."""


def reward_name(function: RewardFunction) -> str:
    """The name under which a reward function is logged."""
    return getattr(function, "__name__", type(function).__name__)


def reward_source(source: Any) -> str:
    """Where a reward comes from, for run.json: the name that it was given by, or the function's file or module."""
    if isinstance(source, str):
        return source
    if address := getattr(source, "url", None) or getattr(getattr(source, "config", None), "_name_or_path", None):
        return str(address)
    made = source if hasattr(source, "__qualname__") else type(source)
    module = sys.modules.get(made.__module__)
    file = getattr(module, "__file__", None)
    return f"{file if made.__module__ == '__main__' and file else made.__module__}:{made.__qualname__}"


def takes(function: RewardFunction, name: str) -> bool:
    """Whether a reward function names a parameter; ``completion_ids`` goes into ``**`` anything, too."""
    signature = _signature(function)
    parameters = [] if signature is None else signature.parameters.values()
    return any(p.name == name or (name == "completion_ids" and p.kind is p.VAR_KEYWORD) for p in parameters)


def require_takes(
    function: RewardFunction, name: str, columns: Collection[str], where: str, *, conversations: bool = False
) -> None:
    """Refuse a reward function that cannot be called with the columns of a data set.

    Args:
        function, name: the reward function and its name.
        columns: the data set's other columns.
        where: the data set's name.
        conversations: whether there are conversations to give to a function that names them.
    Raises:
        ValueError: names the function, its parameters, the columns and the data set.
    """
    if taken := sorted(set(columns) & set(RESERVED)):
        raise ValueError(f"{where} has the columns {taken}, which reward functions receive as well: rename them")
    signature = _signature(function)
    if signature is None:
        return
    extra = ["completion_ids", "conversations", "completion_turns"] if conversations else ["completion_ids"]
    given: dict[str, Any] = dict.fromkeys([*columns, *(name for name in extra if takes(function, name))])
    try:
        signature.bind([], [], **given)
    except TypeError as error:
        raise ValueError(
            f"reward function {name!r} has the parameters {signature}, but is called with prompts, completions and the "
            f"columns {sorted(columns)} of {where}: {error}. Let it take **columns and name those that it needs, or "
            "change the columns"
        ) from None


def _signature(function: RewardFunction) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C do not tell
        return None


def is_async(function: RewardFunction) -> bool:
    """Whether calling it gives something to await: an ``async def``, or an object whose ``__call__`` is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def call_rewards(
    calls: Mapping[str, tuple[RewardFunction, tuple[Any, ...], Mapping[str, Any]]], timeout_s: float | None = None
) -> dict[str, Any]:
    """Call reward functions with their arguments: sync ones one after another, async ones beside all others.

    Args:
        calls: name -> function, its positional and its named arguments.
        timeout_s: longest time in seconds for each call; one that takes longer is left behind.
    Returns:
        Name -> what the function returned.
    Raises:
        RewardError: a function raised (the cause, with its traceback, is chained) or ran out of time.
    """
    began = time.monotonic()
    running = {name: _start_async(*call) for name, call in calls.items() if is_async(call[0])}
    results: dict[str, Any] = {}
    try:
        for name, (function, args, keywords) in calls.items():
            if name not in running:
                results[name] = _result(
                    start(partial(function, *args, **keywords), timeout_s), name, timeout_s, timeout_s
                )
        for name, (future, _) in running.items():
            left = None if timeout_s is None else max(0.0, began + timeout_s - time.monotonic())
            results[name] = _result(future, name, left, timeout_s)
    finally:
        for _, cancel in running.values():
            cancel()
    return {name: results[name] for name in calls}


def _start_async(
    function: RewardFunction, args: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[Future[Any], Callable[[], bool]]:
    """Run on the event loop of all async rewards; returns the future and what cancels it."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    async def run() -> None:
        try:
            future.set_result(await function(*args, **keywords))
        except BaseException as error:  # even an interrupt: it belongs to the caller and must not end the loop
            future.set_exception(error)

    return future, asyncio.run_coroutine_threadsafe(run(), _event_loop()).cancel


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole process, so that clients which belong to a loop live on from rollout to rollout."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _result(future: Future[Any], name: str, wait_s: float | None, timeout_s: float | None) -> Any:
    # Waiting and asking are kept apart: the function may raise a TimeoutError of its own.
    if not has_ended(future, wait_s):
        raise RewardError(f"reward function {name!r} did not return within reward_timeout_s={timeout_s}")
    try:
        return future.result()
    except RewardError:
        raise
    except FAILURES as error:
        raise RewardError(f"reward function {name!r} raised {type(error).__name__}: {error}") from error
