"""Scoring: responses in, checked scores out, one a response or one a token, whatever the reward functions return."""

from __future__ import annotations

import bisect
import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import Tensor

from rlhf_ppo.data.chat import Completion, Prompt
from rlhf_ppo.rewards.cache import ScoreCache
from rlhf_ppo.rewards.functions import RewardError, RewardFunction, StepRewards, call_rewards, reward_name, takes

Score = float | list[float] | None
"""One for the whole response, one per sampled token, or None: it cannot be scored."""

Decode = Callable[[list[int]], str]
"""Token ids -> text, as the completion was made."""

DecodeOf = Callable[[int, int], Decode]
"""(number of the response, number of its turn) -> how its ids became text: what they lie behind matters."""


@dataclass(frozen=True)
class Responses:
    """What reward functions are given about B responses."""

    prompts: Sequence[Prompt]
    """[B] as the data set has them."""
    completions: Sequence[Completion]
    """[B] responses as text, special tokens left out; after several turns a chat's are messages."""
    columns: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    """The prompts' other columns, [B] each."""
    completion_ids: Sequence[list[int]] | None = None
    """[B] the sampled token ids of each response, stop token included, without padding."""
    conversations: Sequence[list[dict[str, str]]] | None = None
    """[B] all messages, where the policy spoke in several turns."""
    completion_turns: Sequence[list[int]] | None = None
    """[B] the number of the turn of each token in ``completion_ids``, likewise."""

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def lengths(self) -> list[int] | None:
        """[B] sampled tokens of each, where they are known."""
        return None if self.completion_ids is None else [len(ids) for ids in self.completion_ids]

    def take(self, rows: Sequence[int]) -> Responses:
        """Some of the responses."""
        return Responses(
            [self.prompts[i] for i in rows],
            [self.completions[i] for i in rows],
            {name: [values[i] for i in rows] for name, values in self.columns.items()},
            None if self.completion_ids is None else [self.completion_ids[i] for i in rows],
            None if self.conversations is None else [self.conversations[i] for i in rows],
            None if self.completion_turns is None else [self.completion_turns[i] for i in rows],
        )

    def arguments(self, function: RewardFunction) -> tuple[RewardFunction, tuple[Any, ...], dict[str, Any]]:
        """The function with the arguments to call it with."""
        keywords: dict[str, Any] = dict(self.columns)
        for name in ("completion_ids", "conversations", "completion_turns"):
            if getattr(self, name) is not None and takes(function, name):
                keywords[name] = getattr(self, name)
        return function, (self.prompts, self.completions), keywords


def score_responses(
    rewards: Mapping[str, RewardFunction],
    responses: Responses,
    *,
    decode_of: DecodeOf | None = None,
    timeout_s: float | None = None,
    drop_nonfinite: bool = False,
    needs_scores: bool = True,
    caches: Mapping[str, ScoreCache] | None = None,
) -> dict[str, list[Score]]:
    """Have responses scored by every reward function, and check what they say.

    Args:
        rewards: name -> function, see :data:`rlhf_ppo.rewards.functions.RewardFunction`.
        responses: B of them.
        decode_of: how ``completion_ids`` became ``completions``; needed for :class:`StepRewards`.
        timeout_s: longest time for each function in seconds.
        drop_nonfinite: turn what is NaN or infinite into None.
        needs_scores: refuse None for all.
        caches: name -> the function's answers so far; only what is not among them is asked.
    Returns:
        Name -> [B] scores.
    Raises:
        RewardError: a function raised (the cause is chained), ran out of time, or returned no list of [B] finite
            scores; never a silent zero.
    """
    caches = caches or {}
    keys = {name: _keys(caches[name], function, responses) for name, function in rewards.items() if name in caches}
    asked = {
        name: caches[name].to_ask(keys[name]) if name in caches else list(range(len(responses))) for name in rewards
    }
    questions = {name: responses.take(asked[name]) for name in rewards}
    # A function that knows everything already is not called.
    results = call_rewards({n: questions[n].arguments(f) for n, f in rewards.items() if asked[n]}, timeout_s)
    scores: dict[str, list[Score]] = {}
    for name in rewards:
        items = coerce_scores(results.get(name, []), len(asked[name]), name, questions[name].lengths)
        if name in caches:
            items = caches[name].complete(keys[name], asked[name], items)
        scores[name] = [
            _settle(item, i, responses, name, decode_of, drop_nonfinite=drop_nonfinite) for i, item in enumerate(items)
        ]
        if needs_scores and all(value is None for value in scores[name]):
            raise RewardError(
                f"reward function {name!r} scored none of the {len(responses)} completions (None for all)"
            )
    return scores


def score(
    function: RewardFunction,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    columns: Mapping[str, Sequence[Any]],
    *,
    completion_ids: Sequence[list[int]] | None = None,
    decode: Decode | None = None,
    timeout_s: float | None = None,
    drop_nonfinite: bool = False,
    needs_scores: bool = True,
) -> list[float | None]:
    """The scores of one reward function, a sum where it scores tokens: see :func:`score_responses`."""
    name = reward_name(function)
    scores = score_responses(
        {name: function},
        Responses(prompts, completions, columns, completion_ids),
        decode_of=None if decode is None else lambda response, turn: decode,
        timeout_s=timeout_s,
        drop_nonfinite=drop_nonfinite,
        needs_scores=needs_scores,
    )
    return [total(value) for value in scores[name]]


def _keys(cache: ScoreCache, function: RewardFunction, responses: Responses) -> list[bytes | None]:
    columns = responses.columns
    # Ids count only where the function sees them: for others the same text is the same question.
    ids = responses.completion_ids if takes(function, "completion_ids") else None
    return [
        cache.key(
            prompt,
            responses.completions[i],
            {name: values[i] for name, values in columns.items()},
            None if ids is None else ids[i],
        )
        for i, prompt in enumerate(responses.prompts)
    ]


def total(value: Score) -> float | None:
    """What a response scored altogether."""
    return sum(value) if isinstance(value, list) else value


def coerce_scores(result: Any, count: int, name: str, lengths: Sequence[int] | None = None) -> list[Any]:
    """Read ``count`` scores from a list, tuple, array or tensor; bools and NumPy numbers count as numbers.

    Args:
        result: what the reward function returned.
        count: completions that it was given.
        name: the function's.
        lengths: [count] tokens of each completion; None: they are not known, so tokens and steps cannot be scored.
    Raises:
        RewardError: another length, nesting or type; says what was expected and what came.
    """
    tokens = "" if lengths is None else ", lists of one number per token, StepRewards"
    expected = f"expected {count} numbers{tokens} (or None), one per completion"
    if isinstance(result, (Tensor, np.ndarray)):
        shape = tuple(result.shape)
        if shape not in ((count,), (count, 1)):
            raise RewardError(f"reward function {name!r} returned an array of shape {shape}; {expected}")
        result = result.reshape(count).tolist()
    if not isinstance(result, (list, tuple)):
        raise RewardError(f"reward function {name!r} returned {type(result).__name__}: {result!r:.80}; {expected}")
    if len(result) != count:
        raise RewardError(f"reward function {name!r} returned {len(result)} scores; {expected}")
    return [
        _item(value, name, f"at index {i}; {expected}", None if lengths is None else lengths[i])
        for i, value in enumerate(result)
    ]


def _item(value: Any, name: str, where: str, length: int | None) -> Score | StepRewards:
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1:
        value = value.tolist()
    if value is None or (length is not None and isinstance(value, StepRewards)):
        return value
    if isinstance(value, (numbers.Real, np.bool_)):
        return _number(value)
    if length is not None and isinstance(value, (list, tuple)):
        if len(value) != length:
            raise RewardError(
                f"reward function {name!r} returned {len(value)} token rewards for a completion of {length} tokens "
                f"{where}; completion_ids holds the tokens"
            )
        numbers_only = [_item(token, name, where, None) for token in value]
        if all(isinstance(token, float) for token in numbers_only):
            return [float(token) for token in numbers_only if isinstance(token, float)]
    raise RewardError(f"reward function {name!r} returned {type(value).__name__} {value!r:.80} {where}")


_FLOAT32_MAX = float(np.finfo(np.float32).max)


def _number(value: Any) -> float:
    """As a float; infinite beyond float32, which is what a run computes in."""
    try:
        number = float(value)
    except OverflowError:  # a whole number or fraction beyond all floats
        number = math.inf if value > 0 else -math.inf
    return math.copysign(math.inf, number) if abs(number) > _FLOAT32_MAX else number


def _settle(
    item: Score | StepRewards,
    i: int,
    responses: Responses,
    name: str,
    decode_of: DecodeOf | None,
    *,
    drop_nonfinite: bool,
) -> Score:
    """Steps laid onto tokens, and everything finite or None."""
    if isinstance(item, StepRewards):
        try:
            item = _steps_on_tokens(item, i, responses, decode_of)
        except ValueError as error:
            raise RewardError(f"reward function {name!r}, completion {responses.completions[i]!r}: {error}") from None
    if item is None or all(map(math.isfinite, item if isinstance(item, list) else [item])):
        return item
    if not drop_nonfinite:
        raise RewardError(
            f"reward function {name!r} scored {item} for prompt {responses.prompts[i]!r} "
            f"with completion {responses.completions[i]!r}; "
            "return None for what cannot be scored, or set drop_nonfinite_scores"
        )
    return None


def _steps_on_tokens(rewards: StepRewards, i: int, responses: Responses, decode_of: DecodeOf | None) -> list[float]:
    """:func:`step_rewards_per_token` of response ``i``, turn by turn where there are several."""
    assert responses.completion_ids is not None  # coerce_scores lets no steps through without
    ids = responses.completion_ids[i]
    if responses.completion_turns is None or responses.conversations is None:
        decode = None if decode_of is None else decode_of(i, 0)
        return step_rewards_per_token(rewards, ids, responses.completions[i], decode)
    turns, prompt = responses.completion_turns[i], responses.prompts[i]
    after = responses.conversations[i][1 if isinstance(prompt, str) else len(prompt) :]
    said = [message["content"] for message in after if message["role"] == "assistant"]
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
            [t for t, k in zip(ids, turns, strict=True) if k == turn],
            text,
            None if decode_of is None else decode_of(i, turn),
        )
    ]


def step_rewards_per_token(
    rewards: StepRewards, ids: Sequence[int], completion: Completion, decode: Decode | None
) -> list[float]:
    """Scores of steps as rewards of sampled tokens: each on the first token with which the step's text is complete.

    The token is found by decoding beginnings of the sampled ids, never by tokenising text again. A character whose
    bytes are spread over several tokens is complete with the last of them.

    Args:
        rewards: the steps.
        ids: [T] the sampled tokens.
        completion: the text that they decode to.
        decode: token ids -> text, as the completion was made.
    Returns:
        [T] rewards; several steps on one token add up.
    Raises:
        ValueError: a step ends outside the completion, or the completion is not the text of its ids.
    """
    assert isinstance(completion, str)  # only after several turns it is not
    placed = [0.0] * len(ids)
    for step in rewards.steps:
        try:
            end, value = cast(tuple[int, float], step)
        except (TypeError, ValueError):
            raise ValueError(f"a step must be a pair (end, score), got {step!r}") from None
        if not isinstance(end, numbers.Integral) or not 1 <= end <= len(completion):
            raise ValueError(f"a step ends at character {end!r}, outside 1..{len(completion)}")
        if not isinstance(value, (numbers.Real, np.bool_)):
            raise ValueError(f"the step that ends at character {end} has the score {value!r}, which is no number")
        if decode is None:
            raise ValueError("steps need decode, the way from token ids to text")
        count = _tokens_until(completion[:end], ids, decode)
        if count > len(ids):
            raise ValueError("the completion is not the text of its token ids, so steps cannot be placed on tokens")
        placed[count - 1] += _number(value)
    return placed


def _tokens_until(text: str, ids: Sequence[int], decode: Decode) -> int:
    """How many tokens it takes for their text to begin with ``text``; one more than there are if it never does."""

    def is_complete(count: int) -> bool:
        return decode(list(ids[:count]))[: len(text)] == text

    return bisect.bisect_left(range(len(ids) + 1), True, key=is_complete)
