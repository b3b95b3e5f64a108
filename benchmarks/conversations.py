"""Time conversations whose replies take a while, asked one after another and side by side.

``python benchmarks/conversations.py``: what you will see, after about a minute, is one JSON line: the seconds of a
rollout of 16 conversations of 4 turns with the model in the package, once with one reply at a time and once side by
side, on the same replies, each of which sleeps for up to a second; beside them the sum of all these sleeps, and that of
the conversation with the longest. The sampled tokens must be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from typing import Any

from rlhf_ppo import PPOTrainer, RLHFConfig


def naps(conversation: str, turns: int, seconds: float) -> list[float]:
    """Return how long each reply of a conversation takes; the same at each call."""
    draws = random.Random(conversation)
    return [draws.uniform(0, seconds) for _ in range(turns)]


def rollout(
    conversations: int, turns: int, seconds: float, folder: str, **settings: Any
) -> tuple[float, list[list[int]]]:
    """Time a rollout; returns its seconds and tokens."""

    async def respond(messages: list[dict[str, Any]]) -> str:
        said = sum(message["role"] == "assistant" for message in messages)
        await asyncio.sleep(naps(messages[0]["content"], turns, seconds)[said - 1])
        return " And then?"

    names = [f"Once upon a time, number {i} said" for i in range(conversations)]
    args = RLHFConfig(
        output_dir=folder,
        rollout_batch_size=conversations,
        num_minibatches=1,
        max_turns=turns,
        max_new_tokens=8,
        device="cpu",
        precision="fp32",
        num_threads=1,
        quiet=True,
        **settings,
    )
    trainer = PPOTrainer("embedded", lambda prompts, completions, **_: [0.0] * len(prompts), args, respond=respond)
    start = time.perf_counter()
    found = trainer.rollout(names)
    return time.perf_counter() - start, found.response_ids.tolist()


def measure(conversations: int, turns: int, seconds: float) -> dict[str, Any]:
    """Time both ways."""
    sleeps = [naps(f"Once upon a time, number {i} said", turns, seconds) for i in range(conversations)]
    with tempfile.TemporaryDirectory() as folder:
        given = conversations, turns, seconds, folder
        rollout(conversations, turns, 0.0, folder)  # the first one also warms up
        one, tokens = rollout(*given, respond_concurrency=1)
        side, same = rollout(*given)
    return {
        "conversations": conversations,
        "one_at_a_time_s": round(one, 2),
        "side_by_side_s": round(side, 2),
        "ratio": round(one / side, 1),
        "all_replies_s": round(sum(map(sum, sleeps)), 2),
        "slowest_conversation_s": round(max(map(sum, sleeps)), 2),
        "same_tokens": tokens == same,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="a reply takes up to so long")
    flags = parser.parse_args(argv)
    found = measure(flags.conversations, flags.turns, flags.seconds)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
