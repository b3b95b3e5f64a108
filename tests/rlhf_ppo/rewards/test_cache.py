"""The score cache: asked once, bounded, and never mistaken about what it was asked."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rlhf_ppo import StepRewards
from rlhf_ppo.rewards.cache import ScoreCache
from rlhf_ppo.rewards.scoring import Responses, score_responses
from rlhf_ppo.rewards.validation import RewardError


class Counting:
    """Scores by length and remembers what it was asked."""

    __name__ = "counting"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, prompts, completions, answer=None):
        self.asked += zip(prompts, completions, strict=True)
        return [None if text == "?" else float(len(text)) for text in completions]


def ask(function: Any, cache: ScoreCache, prompts, completions, ids=None, decode=None, **columns) -> list[Any]:
    responses = Responses(prompts, completions, columns, ids)
    (scores,) = score_responses({"fn": function}, responses, caches={"fn": cache}, decode_of=lambda *_: decode).values()
    return scores


def test_the_same_row_is_scored_once_even_within_one_rollout():
    function, cache = Counting(), ScoreCache()
    assert ask(function, cache, ["p", "q", "p", "p"], ["aa", "aa", "aa", "b"]) == [2.0, 2.0, 2.0, 1.0]
    assert function.asked == [("p", "aa"), ("q", "aa"), ("p", "b")]
    assert ask(function, cache, ["p", "r"], ["b", "ccc"]) == [1.0, 3.0]
    assert function.asked[3:] == [("r", "ccc")]
    assert ask(function, cache, ["p"], ["aa"]) == [2.0]  # nothing new: the function is not called
    assert len(function.asked) == 4 and (cache.hits, cache.lookups) == (3, 7)


def test_columns_and_chats_are_part_of_the_key():
    function, cache = Counting(), ScoreCache()
    chat = [{"role": "user", "content": "p"}]
    for answer in (1, "1", 1.5, None, {"deep": [1]}):
        ask(function, cache, ["p"], ["a"], answer=[answer])
        ask(function, cache, [chat], ["a"], answer=[answer])
    assert len(function.asked) == 10 and cache.hits == 0
    ask(function, cache, [[{"content": "p", "role": "user"}]], ["a"], answer=[{"deep": [1]}])
    assert cache.hits == 1


def test_ids_are_part_of_the_key_of_a_function_that_sees_them():
    def tokens(prompts, completions, completion_ids):
        return [[float(token) for token in ids] for ids in completion_ids]

    cache = ScoreCache()
    # The same text from other tokens: other rewards, of another length.
    assert ask(tokens, cache, ["p", "p", "p"], ["ab"] * 3, [[3, 4], [7], [3, 4]]) == [[3.0, 4.0], [7.0], [3.0, 4.0]]
    assert cache.hits == 1
    function, cache = Counting(), ScoreCache()
    ask(function, cache, ["p", "p"], ["ab"] * 2, [[3, 4], [7]])
    assert len(function.asked) == 1


def test_steps_are_cached_by_character_and_placed_on_each_responses_own_tokens():
    def judge(prompts, completions):
        return [StepRewards([(2, 1.0)]) for _ in completions]

    def decode(ids):
        return "".join({3: "a", 4: "b", 7: "ab"}[token] for token in ids)

    cache = ScoreCache()
    assert ask(judge, cache, ["p", "p"], ["ab", "ab"], [[3, 4], [7]], decode) == [[0.0, 1.0], [1.0]]
    assert cache.hits == 1


def test_rows_that_json_cannot_hold_are_scored_each_time():
    function, cache = Counting(), ScoreCache()
    for _ in range(2):
        assert ask(function, cache, ["p", "p"], ["a", "a"], answer=[object(), object()]) == [1.0, 1.0]
    assert len(function.asked) == 4 and cache.hits == 0


def test_none_is_not_cached():
    function, cache = Counting(), ScoreCache()
    for _ in range(2):
        assert ask(function, cache, ["p", "p", "p"], ["?", "a", "?"]) == [None, 1.0, None]
    assert function.asked == [("p", "?"), ("p", "a"), ("p", "?")]


def test_the_least_recently_used_scores_are_evicted_first():
    function, cache = Counting(), ScoreCache(size=2)
    ask(function, cache, ["p", "p"], ["a", "b"])
    ask(function, cache, ["p"], ["a"])  # a is younger than b now
    ask(function, cache, ["p"], ["c"])  # b leaves
    ask(function, cache, ["p", "p"], ["a", "c"])
    assert [text for _, text in function.asked] == ["a", "b", "c"]
    # More rows than it can hold are still answered in full.
    assert ask(function, cache, ["p"] * 5, ["a", "bb", "ccc", "dddd", "bb"]) == [1.0, 2.0, 3.0, 4.0, 2.0]


def test_a_function_that_fails_leaves_the_cache_unchanged():
    cache = ScoreCache()
    with pytest.raises(RewardError):
        ask(lambda p, c: 1 / 0, cache, ["p"], ["a"])
    with pytest.raises(RewardError, match="returned 2 scores"):
        ask(lambda p, c: [1.0, 2.0], cache, ["p", "p"], ["a", "a"])
    assert ask(lambda p, c: [5.0], cache, ["p"], ["a"]) == [5.0]


def test_a_run_uses_it_and_logs_the_share(make_trainer):
    """One-letter answers to two prompts repeat; with and without a cache the run is the same."""

    def make(**settings):
        function = Counting()
        rows = [{"prompt": p} for p in ("a", "b")] * 4
        trainer = make_trainer(reward_funcs=function, train_dataset=rows, max_new_tokens=1, **settings)
        trainer.train()
        return function, trainer

    asked_all, plain = make()
    asked_once, cached = make(cache_rewards=True)
    assert len(asked_all.asked) == 16 and len(asked_once.asked) == len(set(asked_all.asked)) < 16
    rows = cached.run.read()
    shares = [row.pop("score/cache_hit_fraction") for row in rows]
    assert rows == plain.run.read()
    assert sum(shares) * 8 == 16 - len(asked_once.asked)


def test_a_reward_that_looks_at_conversations_is_never_cached():
    from rlhf_ppo.rewards.cache import make_caches

    def judge(prompts, completions, conversations=None):
        return [0.0]

    def by_turn(prompts, completions, completion_turns=None):
        return [0.0]

    functions = {"judge": judge, "by_turn": by_turn, "counting": Counting()}
    assert list(make_caches({name: (function, 1.0) for name, function in functions.items()})) == ["counting"]


def test_a_cache_without_a_cacheable_reward_is_refused(make_trainer):
    def judge(prompts, completions, conversations=None):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"cache_rewards=True has no effect: all of the rewards \['judge'\]"):
        make_trainer(reward_funcs=judge, cache_rewards=True, max_turns=2, respond=lambda messages: "x")


def test_steps_survive_a_checkpoint():
    """NumPy's numbers are no JSON."""
    cache = ScoreCache()
    steps = [StepRewards([(2, np.float32(0.5)), (np.int64(4), 1.0)]), StepRewards([(0, 2, 1.0), (1, 3, 0.25)]), 2.0]
    keys = [ScoreCache.key(i) for i in range(3)]
    cache.complete(keys, [0, 1, 2], steps)
    again = ScoreCache()
    again.load_state_dict(json.loads(json.dumps(cache.state_dict())))
    assert again.to_ask(keys) == []
    assert again.complete(keys, [], []) == [
        StepRewards([(2, 0.5), (4, 1.0)]),
        StepRewards([(0, 2, 1.0), (1, 3, 0.25)]),
        2.0,
    ]
