"""Side by side: calls run at the same time within their bounds, and none that hangs is waited for."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from rlhf_ppo.runtime.side_by_side import Calls, CallTimeoutError, event_loop, settled


def results(calls: Calls, started: list) -> list:
    while any(not call.future.done() for call in started):
        calls.ended(started, patience_s=60)
    return [call.future.result() for call in started]


@pytest.mark.parametrize("at_once", [1, 2, None])
def test_at_most_so_many_run_at_once_and_they_begin_in_order(at_once):
    together = threading.Barrier(at_once or 6)  # no call ends before so many run
    began, running, most = [], set(), []

    def call(i: int) -> int:
        began.append(i)
        running.add(i)
        most.append(len(running))
        together.wait(timeout=60)
        running.discard(i)
        return i * i

    calls = Calls(at_once)
    started = [calls.start(lambda i=i: call(i)) for i in range(6)]
    assert results(calls, started) == [i * i for i in range(6)]
    assert max(most) <= (at_once or 6)
    assert sorted(began) == list(range(6)) and (at_once != 1 or began == list(range(6)))


def test_calls_begin_while_the_thread_that_made_them_does_something_else():
    calls = Calls(1)
    started = [calls.start(lambda: None) for _ in range(5)]
    end = time.monotonic() + 60
    while not started[-1].future.done() and time.monotonic() < end:
        time.sleep(0.001)
    assert started[-1].future.done()


def test_those_that_have_ended_are_returned_in_the_order_asked_about():
    never = threading.Event()
    calls = Calls()
    hangs, first, fails = calls.start(never.wait), calls.start(lambda: 1), calls.start(lambda: 1 / 0)
    for call in (first, fails):
        while not call.future.done():
            time.sleep(0.001)
    assert calls.ended([fails, hangs, first], patience_s=0) == [fails, first]
    assert isinstance(fails.future.exception(), ZeroDivisionError)
    never.set()


def test_what_a_call_awaits_runs_on_one_loop_and_is_cancelled():
    seen, cancelled = [], threading.Event()

    async def hangs() -> None:
        seen.append(asyncio.get_running_loop())
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def quick() -> int:
        seen.append(asyncio.get_running_loop())
        return 3

    calls = Calls(timeout_s=0.1)
    slow, fast = calls.start(hangs), calls.start(quick)
    assert calls.ended([fast], patience_s=0) == [fast] and fast.future.result() == 3
    with pytest.raises(CallTimeoutError) as error:
        calls.ended([slow], patience_s=0)
    assert error.value.call is slow
    calls.abandon()
    assert cancelled.wait(60) and set(seen) == {event_loop()}


def test_a_queued_call_has_not_begun_and_is_not_late():
    gate = threading.Event()
    calls = Calls(1, timeout_s=0.05)
    first, queued = calls.start(gate.wait), calls.start(lambda: 1)
    with pytest.raises(CallTimeoutError) as error:
        calls.ended([queued, first], patience_s=0)
    assert error.value.call is first and queued.began is None
    calls.abandon()
    gate.set()
    first.future.result(timeout=60)
    assert not queued.future.done()  # abandoned before it began


def test_outside_a_call_an_awaitable_is_settled_too():
    async def three() -> int:
        return 3

    assert settled(three()) == 3 and settled(4) == 4
