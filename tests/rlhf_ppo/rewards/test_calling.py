"""Calls of reward functions: within their time limit, async ones concurrently."""

from __future__ import annotations

import asyncio
import functools
import threading
import traceback

import pytest

from rlhf_ppo.rewards.calling import call_rewards, is_async
from rlhf_ppo.rewards.scoring import score
from rlhf_ppo.rewards.validation import RewardError


class AsyncObject:
    __name__ = "object"

    async def __call__(self, prompts, completions, **columns):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]


async def async_lengths(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize("function", [async_lengths, AsyncObject(), functools.partial(async_lengths, note=1)])
def test_an_async_reward_is_awaited(function, timeout):
    assert is_async(function)
    assert score(function, ["p", "q"], ["a", "bb"], {}, timeout_s=timeout) == [1.0, 2.0]


def test_async_rewards_run_concurrently_and_beside_a_sync_one():
    """Each of three waits until all have begun; one after another they would wait for ever."""
    begun = threading.Barrier(3)

    async def first(prompts, completions):
        await asyncio.to_thread(begun.wait, 10)
        return [1.0]

    async def second(prompts, completions):
        await asyncio.to_thread(begun.wait, 10)
        return [2.0]

    def third(prompts, completions):
        begun.wait(10)
        return [3.0]

    calls = {f.__name__: (f, (["p"], ["c"]), {}) for f in (third, first, second)}
    results = call_rewards(calls, 10)
    assert results == {"third": [3.0], "first": [1.0], "second": [2.0]} and list(results) == list(calls)


def test_a_client_bound_to_an_event_loop_serves_several_rollouts():
    loops: list[asyncio.AbstractEventLoop] = []

    async def remembers(prompts, completions):
        loops.append(asyncio.get_running_loop())
        return [0.0]

    for _ in range(2):
        score(remembers, ["p"], ["c"], {})
    assert loops[0] is loops[1] and loops[0].is_running()


def test_fault_14_an_async_reward_that_hangs_times_out_and_is_cancelled():
    ended = threading.Event()

    async def hangs(prompts, completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.set()
            raise

    with pytest.raises(RewardError, match=r"'hangs' did not return within reward_timeout_s=0\.1"):
        score(hangs, ["p"], ["c"], {}, timeout_s=0.1)
    assert ended.wait(10)


def test_fault_14_an_async_rewards_traceback_and_own_timeout_error_are_reported():
    async def broken(prompts, completions):
        await asyncio.sleep(0)
        raise TimeoutError("of the service")

    with pytest.raises(RewardError, match="'broken' raised TimeoutError: of the service") as error:
        score(broken, ["p"], ["c"], {}, timeout_s=10)
    cause = error.value.__cause__
    assert cause is not None and traceback.extract_tb(cause.__traceback__)[-1].name == "broken"


def test_an_interrupt_inside_an_async_reward_reaches_the_caller_and_the_loop_survives():
    async def interrupted(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted, ["p"], ["c"], {})
    assert score(async_lengths, ["p"], ["abc"], {}) == [3.0]
