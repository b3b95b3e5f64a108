"""Process rewards: place the score of each step on the sampled token that completes the step's text."""

from __future__ import annotations

import bisect
import numbers
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from rlhf_ppo.data.chat import Completion
from rlhf_ppo.rewards.functions import StepRewards
from rlhf_ppo.rewards.validation import to_float

Decode = Callable[[list[int]], str]
"""Token ids -> text, as the completion was decoded."""


def step_rewards_per_token(
    rewards: StepRewards, ids: Sequence[int], completion: Completion, decode: Decode | None
) -> list[float]:
    """Place scores of steps on sampled tokens: each on the first token with which the step's text is complete.

    The token is found by decoding prefixes of the sampled ids, never by tokenizing text again. A character spread over
    several tokens is complete with the last of them.

    Args:
        rewards: the steps.
        ids: [T] the sampled tokens.
        completion: the text that they decode to.
        decode: token ids -> text, as the completion was decoded.
    Returns:
        [T] rewards; several steps on one token add up.
    Raises:
        ValueError: a step ends outside the completion, or the completion is not the text of its ids.
    """
    assert isinstance(completion, str)  # messages come from several turns only: step_rewards_per_turn
    placed = [0.0] * len(ids)
    for step in rewards.steps:
        try:
            end, value = cast(tuple[int, float], step)
        except (TypeError, ValueError):
            raise ValueError(f"a step must be a pair (end, score), got {step!r}") from None
        if not isinstance(end, numbers.Integral) or not 1 <= end <= len(completion):
            raise ValueError(f"a step ends at character {end!r}, outside 1..{len(completion)}")
        if not isinstance(value, (numbers.Real, np.bool_)):
            raise ValueError(f"the step that ends at character {end} has the score {value!r}, which is not a number")
        if decode is None:
            raise ValueError("steps need decode, a function from token ids to text")
        count = _tokens_until(completion[:end], ids, decode)
        if count > len(ids):
            raise ValueError("the completion is not the text of its token ids, so steps cannot be placed on tokens")
        placed[count - 1] += to_float(value)
    return placed


def step_rewards_per_turn(
    rewards: StepRewards,
    ids: Sequence[int],
    turns: Sequence[int],
    said: Sequence[str],
    decode_of: Callable[[int], Decode] | None,
) -> list[float]:
    """Place scores of steps (turn, end, score) on sampled tokens, turn by turn.

    Args:
        rewards: the steps.
        ids: [T] the sampled tokens of all turns.
        turns: [T] the turn of each token.
        said: the policy's text in each turn.
        decode_of: number of a turn -> how its ids were decoded.
    Returns:
        [T] rewards.
    Raises:
        ValueError: see :func:`step_rewards_per_token`; no such turn.
    """
    by_turn: list[list[tuple[int, float]]] = [[] for _ in said]
    for step in rewards.steps:
        try:
            turn, end, value = cast(tuple[int, int, float], step)
        except (TypeError, ValueError):
            raise ValueError(f"after several turns a step must be (turn, end, score), got {step!r}") from None
        if not isinstance(turn, numbers.Integral) or not 0 <= turn < len(said):
            raise ValueError(f"a step names turn {turn!r}, but the turns are 0..{len(said) - 1}")
        by_turn[turn].append((end, value))
    return [
        value
        for turn, (text, steps) in enumerate(zip(said, by_turn, strict=True))
        for value in step_rewards_per_token(
            StepRewards(steps),
            [token for token, k in zip(ids, turns, strict=True) if k == turn],
            text,
            None if decode_of is None else decode_of(turn),
        )
    ]


def _tokens_until(text: str, ids: Sequence[int], decode: Decode) -> int:
    """Count the tokens until their text begins with ``text``; one more than there are if it never does."""

    def is_complete(count: int) -> bool:
        return decode(list(ids[:count]))[: len(text)] == text

    return bisect.bisect_left(range(len(ids) + 1), True, key=is_complete)
