"""Conversations side by side: who waits for a reply stops nobody else, and order changes no token."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
import time

import pytest
import torch

from rlhf_ppo.generation import multi_turn
from rlhf_ppo.generation.multi_turn import RespondError
from rlhf_ppo.generation.sampling import RowsOf, uniforms


@pytest.fixture
def talk(make_trainer):
    """A trainer for conversations of three turns of up to four tokens."""

    def make(**settings):
        return make_trainer(**{"max_turns": 3, "max_new_tokens": 4, "stop_token_ids": (0, 12, 16), **settings})

    return make


def batches(trainer) -> list[list[int]]:
    """Return the rows of each call of the sampler from now on."""
    sample, seen = trainer.fixed.sample, list[list[int]]()

    def watched(*args, whole, **settings):
        seen.append(list(whole.rows))
        return sample(*args, whole=whole, **settings)

    trainer.fixed = dataclasses.replace(trainer.fixed, sample=watched)
    return seen


def turns_of(messages) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def test_a_slow_reply_does_not_stop_the_others(talk, prompts):
    """Row 0 gets its first reply only when another has spoken its third turn: waiting for all would never end."""
    third = threading.Event()

    def respond(messages):
        if turns_of(messages) == 3:
            third.set()
        if messages[0]["content"] == prompts[0] and turns_of(messages) == 1:
            assert third.wait(60)
        return " and"

    trainer = talk(respond=respond, respond_timeout_s=60.0)
    seen = batches(trainer)
    rollout = trainer.rollout(prompts)
    assert (rollout.turns.amax(dim=1) == 2).all()
    assert seen[0] == list(range(8)) and seen[-1] == [0] and all(rows == sorted(rows) for rows in seen)
    trainer.step(rollout)


def test_replies_that_come_at_once_are_decoded_together(talk, prompts):
    trainer = talk(respond=lambda messages: " and")
    seen = batches(trainer)
    trainer.rollout(prompts)
    assert seen == [list(range(8))] * 3


def test_one_at_a_time_asks_in_order_and_waits_for_all(talk, prompts, monkeypatch):
    """As a function needs that draws from one generator; whatever its replies take."""
    monkeypatch.setattr(multi_turn, "GRACE_S", 0.0)
    asked = []

    def respond(messages):
        asked.append((turns_of(messages), prompts.index(messages[0]["content"])))
        time.sleep(0.003)
        return " and"

    trainer = talk(respond=respond, respond_concurrency=1)
    seen = batches(trainer)
    trainer.rollout(prompts)
    assert asked == [(turn, row) for turn in (1, 2, 3) for row in range(8)]
    assert seen == [list(range(8))] * 3


@pytest.mark.parametrize("kind", ["async", "threads"])
def test_the_order_of_replies_changes_no_token(talk, prompts, monkeypatch, kind):
    """In float64, where the batch that a row is decoded in cannot move a draw across the edge between two tokens."""
    monkeypatch.setattr(multi_turn, "GRACE_S", 0.0)
    monkeypatch.setattr(multi_turn, "PATIENCE", 0.0)
    delays = random.Random(3)

    def reply(messages):
        return None if len(messages[0]["content"]) % 4 == turns_of(messages) else f" {messages[-1]['content'][:2]} and"

    def in_threads(messages):
        time.sleep(delays.random() * 0.03)
        return reply(messages)

    async def awaited(messages):
        await asyncio.sleep(delays.random() * 0.03)
        return reply(messages)

    def rollout(respond, **settings):
        trainer = talk(respond=respond, num_generations=2, **settings)
        trainer.model.double()
        seen = batches(trainer)
        return trainer.rollout(prompts[:4]), seen

    torch.set_default_dtype(torch.float64)
    try:
        expected, together = rollout(reply, respond_concurrency=1)
        found, apart = rollout(awaited if kind == "async" else in_threads)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(together) == 3 < len(apart)
    assert found.response_ids.tolist() == expected.response_ids.tolist()
    assert found.conversations == expected.conversations and found.mask.tolist() == expected.mask.tolist()
    # Two conversations about one prompt have draws of their own.
    assert len({str(row) for row in found.response_ids.tolist()}) == 8


def test_draws_are_numbered_by_row_and_turn():
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(5)

    def draws(rows, turns):
        return uniforms(3, len(rows), generator, device, RowsOf(rows, 8, turns))

    mixed = draws([6, 1, 2], [0, 2, 0])
    torch.testing.assert_close(mixed[:, 1], draws([1], [2])[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(mixed[:, [2, 0]], draws([2, 6], [0, 0]), rtol=0, atol=0)
    everything = draws([row for row in range(8) for _ in range(4)], [*range(4)] * 8)
    assert everything.unique().numel() == 3 * 8 * 4
    other = torch.Generator().manual_seed(6)
    assert not torch.equal(uniforms(3, 1, other, device, RowsOf([1], 8, [2])), draws([1], [2]))


def test_an_async_hook_that_hangs_is_cancelled_and_named(talk, prompts):
    cancelled = threading.Event()

    async def respond(messages):
        if messages[0]["content"] != prompts[2]:
            return
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with pytest.raises(RespondError, match=r"respond did not return within respond_timeout_s=0\.1, in conversation 2"):
        talk(respond=respond, respond_timeout_s=0.1).rollout(prompts)
    assert cancelled.wait(60)


def test_an_async_hook_that_fails_is_named_like_any_other(talk, prompts):
    async def respond(messages):
        return 3 if messages[0]["content"] == prompts[5] else " and"

    with pytest.raises(RespondError, match=r"respond must return text.*returned int 3, in conversation 5"):
        talk(respond=respond).rollout(prompts)


def test_no_more_calls_than_respond_concurrency_run_at_once(talk, prompts):
    running, most = 0, 0

    async def respond(messages):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1
        return " and"

    talk(respond=respond, respond_concurrency=3).rollout(prompts)
    assert most == 3
