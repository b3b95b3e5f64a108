"""How reward functions are called: with what they take, within their time, and async ones side by side."""

from __future__ import annotations

import asyncio
import functools
import threading
import traceback

import pytest

from rlhf_ppo.rewards.functions import RewardError, call_rewards, is_async, require_takes, takes
from rlhf_ppo.rewards.loading import score


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


def test_async_rewards_of_one_rollout_run_at_the_same_time_and_beside_a_sync_one():
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


def test_a_client_that_belongs_to_an_event_loop_serves_one_rollout_after_another():
    loops: list[asyncio.AbstractEventLoop] = []

    async def remembers(prompts, completions):
        loops.append(asyncio.get_running_loop())
        return [0.0]

    for _ in range(2):
        score(remembers, ["p"], ["c"], {})
    assert loops[0] is loops[1] and loops[0].is_running()


def test_fault_14_an_async_reward_that_hangs_meets_the_timeout_and_is_cancelled():
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


def test_fault_14_the_traceback_of_an_async_reward_is_kept_and_a_timeout_of_its_own_is_its_own():
    async def broken(prompts, completions):
        await asyncio.sleep(0)
        raise TimeoutError("of the service")

    with pytest.raises(RewardError, match="'broken' raised TimeoutError: of the service") as error:
        score(broken, ["p"], ["c"], {}, timeout_s=10)
    cause = error.value.__cause__
    assert cause is not None and traceback.extract_tb(cause.__traceback__)[-1].name == "broken"


def test_an_interrupt_inside_an_async_reward_reaches_the_caller_and_the_loop_lives_on():
    async def interrupted(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted, ["p"], ["c"], {})
    assert score(async_lengths, ["p"], ["abc"], {}) == [3.0]


def test_token_ids_go_to_functions_that_take_them():
    seen: dict[str, object] = {}

    def names(prompts, completions, completion_ids=None):
        seen["names"] = completion_ids
        return [0.0]

    def takes_anything(prompts, completions, **columns):
        seen["anything"] = columns["completion_ids"]
        return [0.0]

    def takes_neither(prompts, completions, answer):
        seen["neither"] = answer
        return [0.0]

    score(names, ["p"], ["c"], {}, completion_ids=[[5, 6]])
    score(takes_anything, ["p"], ["c"], {"answer": [1]}, completion_ids=[[5, 6]])
    score(takes_neither, ["p"], ["c"], {"answer": [1]}, completion_ids=[[5, 6]])
    assert seen == {"names": [[5, 6]], "anything": [[5, 6]], "neither": [1]}
    assert takes(takes_anything, "completion_ids") and not takes(takes_anything, "conversations")


def test_a_rollouts_ids_are_the_sampled_ones_without_padding(make_trainer, prompts):
    seen: list[list[int]] = []

    def reward(prompts, completions, completion_ids, **columns):
        seen.extend(completion_ids)
        return [float(i) for i in range(len(prompts))]

    rollout = make_trainer(reward_funcs=reward).rollout(prompts)
    assert [len(ids) for ids in seen] == rollout.lengths.tolist() and len(set(map(len, seen))) > 1
    for ids, row, keep in zip(seen, rollout.response_ids, rollout.mask, strict=True):
        assert ids == row[keep].tolist()


def wants(prompts, completions, answer):
    return [0.0] * len(prompts)


def test_a_function_that_cannot_take_the_columns_is_an_error_at_the_start(make_trainer):
    with pytest.raises(
        ValueError, match=r"'wants' has the parameters .*answer.*\['answer', 'id'\] of train_dataset.*'id'"
    ):
        make_trainer(reward_funcs=wants, train_dataset=[{"prompt": "a", "answer": 1, "id": 2}] * 8)
    with pytest.raises(
        ValueError, match=r"'wants'.*columns \[\] of train_dataset: missing a required argument: 'answer'"
    ):
        make_trainer(reward_funcs=wants, train_dataset=[{"prompt": "a"}] * 8)
    rows = [{"prompt": "a", "answer": 1}] * 8
    with pytest.raises(ValueError, match=r"columns \[\] of eval_dataset"):
        make_trainer(reward_funcs=wants, train_dataset=rows, eval_dataset=[{"prompt": "a"}])
    make_trainer(reward_funcs=wants, train_dataset=rows, eval_dataset=rows)


def test_functions_that_do_not_tell_their_parameters_are_called_as_they_are():
    require_takes(max, "max", ["answer"], "train_dataset")  # written in C
    assert not takes(max, "completion_ids")


@pytest.mark.parametrize("column", ["completions", "completion_ids", "prompts", "conversations", "completion_turns"])
def test_a_column_with_the_name_of_an_argument_is_refused(make_trainer, column):
    with pytest.raises(ValueError, match=rf"train_dataset has the columns \['{column}'\].*rename them"):
        make_trainer(train_dataset=[{"prompt": "a", column: 1}] * 8)
