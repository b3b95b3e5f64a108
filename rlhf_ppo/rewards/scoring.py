"""Score responses with every reward function: one checked score per response, or one per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf_ppo.data.chat import SAMPLED_TEXT, Completion, Prompt
from rlhf_ppo.rewards.cache import ScoreCache, decoded_score, encoded_score
from rlhf_ppo.rewards.calling import call_rewards
from rlhf_ppo.rewards.functions import RewardFunction, StepRewards, accepts, reward_name
from rlhf_ppo.rewards.logs import LOGGERS, CallLog, RewardLog
from rlhf_ppo.rewards.step_rewards import Decode, step_rewards_per_token, step_rewards_per_turn
from rlhf_ppo.rewards.validation import RewardError, Score, coerce_scores, finite_or_none
from rlhf_ppo.runtime.processes.group import ALONE, ProcessGroup

DecodeOf = Callable[[int, int], Decode]
"""(number of the response, number of its turn) -> how its ids were decoded, which depends on what precedes them."""


@dataclass(frozen=True)
class Responses:
    """What reward functions receive about B responses."""

    prompts: Sequence[Prompt]
    """[B] as in the data set."""
    completions: Sequence[Completion]
    """[B] responses as text without special tokens; after several turns of a chat, messages."""
    columns: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    """The prompts' other columns, [B] each."""
    completion_ids: Sequence[list[int]] | None = None
    """[B] sampled token ids of each response, stop token included, without padding."""
    conversations: Sequence[list[dict[str, str]]] | None = None
    """[B] all messages, after several turns."""
    completion_turns: Sequence[list[int]] | None = None
    """[B] the turn of each token in ``completion_ids``, after several turns."""

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def lengths(self) -> list[int] | None:
        """[B] number of sampled tokens of each, if known."""
        return None if self.completion_ids is None else [len(ids) for ids in self.completion_ids]

    def take(self, rows: Sequence[int]) -> Responses:
        """Return the responses with these indices."""
        return Responses(
            [self.prompts[i] for i in rows],
            [self.completions[i] for i in rows],
            {name: [values[i] for i in rows] for name, values in self.columns.items()},
            None if self.completion_ids is None else [self.completion_ids[i] for i in rows],
            None if self.conversations is None else [self.conversations[i] for i in rows],
            None if self.completion_turns is None else [self.completion_turns[i] for i in rows],
        )

    def arguments(
        self, function: RewardFunction, log: CallLog
    ) -> tuple[RewardFunction, tuple[Any, ...], dict[str, Any]]:
        """Return the function with its positional and keyword arguments; ``log`` takes what it logs."""
        keywords: dict[str, Any] = dict(self.columns)
        keywords |= {name: getattr(log, name) for name in LOGGERS if accepts(function, name)}
        for name in ("completion_ids", "conversations", "completion_turns"):
            if getattr(self, name) is not None and accepts(function, name):
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
    processes: ProcessGroup = ALONE,
    own: Sequence[int] | None = None,
    whole_rollout: bool = False,
    log: RewardLog | None = None,
) -> dict[str, list[Score]]:
    """Call every reward function and check what it returns.

    Args:
        rewards: name -> function, see :data:`rlhf_ppo.rewards.functions.RewardFunction`.
        responses: B of them.
        decode_of: how ``completion_ids`` were decoded; needed for :class:`StepRewards`.
        timeout_s: time limit of each function in seconds.
        drop_nonfinite: turn NaN and infinite scores into None.
        needs_scores: refuse None for all.
        caches: name -> the function's scores so far; it is called with the other rows alone.
        processes: those that share the work; each returns all scores.
        own: the responses that this process scores; None: all of them.
        whole_rollout: the first process scores all of them; so it does for a function whose attribute
            ``whole_rollout`` is true, and not for one whose attribute is false.
        log: takes what the functions log; after an error it has what those of this process had logged.
    Returns:
        Name -> [B] scores.
    Raises:
        RewardError: a function raised (the cause is chained), exceeded the limit, or did not return [B] finite scores;
            never a silent zero.
    """
    caches, log = caches or {}, log or RewardLog()
    keys = {name: _keys(caches[name], function, responses) for name, function in rewards.items() if name in caches}
    asked = {
        name: caches[name].to_ask(keys[name]) if name in caches else list(range(len(responses))) for name in rewards
    }

    def answer(rewards: Mapping[str, RewardFunction]) -> dict[str, Any]:
        mine: dict[str, list[int]] = {}
        for name, function in rewards.items():
            at_once = getattr(function, "whole_rollout", whole_rollout)
            here = range(len(responses)) if own is None else own
            here = here if not at_once else range(len(responses)) if processes.first else ()
            mine[name] = [i for i in asked[name] if i in here]
        questions = {name: responses.take(mine[name]) for name in rewards}
        # A function whose scores are all cached is not called, unless another process needs this one's weights.
        called = {n: f for n, f in rewards.items() if mine[n] or n in shared}
        logs = {n: log.begin(n, mine[n]) for n in called}
        results = _call(called, questions, logs, timeout_s)
        answers = {n: coerce_scores(results.get(n, []), len(mine[n]), n, questions[n].lengths) for n in rewards}
        sent = answers if processes.alone else {n: [*map(encoded_score, items)] for n, items in answers.items()}
        scored = {n: [*zip(mine[n], sent[n], strict=True)] for n in rewards}
        return {"scores": scored, "logs": [call.facts() for call in logs.values()]}

    # First the others: a function that fails on one process must not leave the rest waiting inside a model.
    shared = {n: f for n, f in rewards.items() if getattr(f, "together", False)}
    parts = processes.facts(lambda: answer({n: f for n, f in rewards.items() if n not in shared}))
    if shared:
        parts += [part.facts for part in processes.exchange_together(lambda: ({}, answer(shared)))]
    log.gather([call for part in parts for call in part["logs"]])
    scores: dict[str, list[Score]] = {}
    for name in rewards:
        given = {i: decoded_score(item) for part in parts for i, item in part["scores"].get(name, [])}
        items = [given[i] for i in asked[name]]
        if name in caches:
            items = caches[name].complete(keys[name], asked[name], items)
        scores[name] = _checked(items, name, responses, decode_of, drop_nonfinite=drop_nonfinite)
        if needs_scores and all(value is None for value in scores[name]):
            raise RewardError(
                f"reward function {name!r} scored none of the {len(responses)} completions (None for all)"
            )
    return scores


def _checked(
    items: Sequence[Score | StepRewards],
    name: str,
    responses: Responses,
    decode_of: DecodeOf | None,
    *,
    drop_nonfinite: bool,
) -> list[Score]:
    """Place process rewards on tokens, and refuse or drop non-finite scores."""
    return [
        finite_or_none(
            _place(item, i, responses, name, decode_of),
            name,
            responses.prompts[i],
            responses.completions[i],
            drop_nonfinite=drop_nonfinite,
        )
        for i, item in enumerate(items)
    ]


def _call(
    functions: Mapping[str, RewardFunction],
    questions: Mapping[str, Responses],
    logs: Mapping[str, CallLog],
    timeout_s: float | None,
) -> dict[str, Any]:
    """Call functions about their own responses; returns what each has returned, and checks what it has logged."""
    results = call_rewards({n: questions[n].arguments(f, logs[n]) for n, f in functions.items()}, timeout_s)
    for call in logs.values():
        call.require_whole()
    return results


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
    log: RewardLog | None = None,
) -> list[float | None]:
    """Score responses with one reward function, summing token rewards: see :func:`score_responses`."""
    name = reward_name(function)
    scores = score_responses(
        {name: function},
        Responses(prompts, completions, columns, completion_ids),
        decode_of=None if decode is None else lambda response, turn: decode,
        timeout_s=timeout_s,
        drop_nonfinite=drop_nonfinite,
        needs_scores=needs_scores,
        log=log,
    )
    return [total_score(value) for value in scores[name]]


def _keys(cache: ScoreCache, function: RewardFunction, responses: Responses) -> list[bytes | None]:
    columns = responses.columns
    # Ids are part of the key only if the function sees them: for others equal text has an equal score.
    ids = responses.completion_ids if accepts(function, "completion_ids") else None
    return [
        cache.key(
            prompt,
            responses.completions[i],
            {name: values[i] for name, values in columns.items()},
            None if ids is None else ids[i],
        )
        for i, prompt in enumerate(responses.prompts)
    ]


def total_score(value: Score) -> float | None:
    """Return the score of a whole response: the sum of its token rewards, or its score."""
    return sum(value) if isinstance(value, list) else value


def _place(item: Score | StepRewards, i: int, responses: Responses, name: str, decode_of: DecodeOf | None) -> Score:
    """Place response ``i``'s process rewards on its tokens; leave any other score as it is."""
    if not isinstance(item, StepRewards):
        return item
    assert responses.completion_ids is not None  # coerce_scores accepts no steps without
    ids, completion = responses.completion_ids[i], responses.completions[i]
    try:
        if responses.completion_turns is None or responses.conversations is None:
            return step_rewards_per_token(item, ids, completion, None if decode_of is None else decode_of(i, 0))
        prompt = responses.prompts[i]
        after = responses.conversations[i][1 if isinstance(prompt, str) else len(prompt) :]
        said = [message.get(SAMPLED_TEXT, message["content"]) for message in after if message["role"] == "assistant"]
        by_turn = None if decode_of is None else partial(decode_of, i)
        return step_rewards_per_turn(item, ids, responses.completion_turns[i], said, by_turn)
    except ValueError as error:
        raise RewardError(f"reward function {name!r}, completion {completion!r}: {error}") from None
