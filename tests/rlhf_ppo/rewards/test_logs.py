"""What reward functions log: who gets the loggers, what they accept, and where it appears."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ppo.rewards.cache import ScoreCache
from rlhf_ppo.rewards.functions import require_accepts_columns
from rlhf_ppo.rewards.http_client import HTTPReward
from rlhf_ppo.rewards.logs import CallLog, RewardLog
from rlhf_ppo.rewards.scoring import Responses, score_responses
from rlhf_ppo.rewards.validation import RewardError
from tests.rlhf_ppo.rewards.test_http_client import answering
from tests.rlhf_ppo.rewards.test_http_server import client, serving


def ask(function: Any, completions: list[str], cache: ScoreCache | None = None) -> RewardLog:
    log, caches = RewardLog(), {} if cache is None else {"f": cache}
    score_responses({"f": function}, Responses(["p"] * len(completions), completions), caches=caches, log=log)
    return log


def lengths(completions, log_metric=None, log_extra=None, **kwargs):
    """As TRL's users write it: the loggers by name, absent where nobody logs."""
    found = [float(len(text)) for text in completions]
    if log_extra is not None:
        log_extra("letters", list(completions))
        log_metric("length", sum(found) / len(found))
    return found


def by_keyword(prompts, completions, log_metric, log_extra):
    return lengths(completions, log_metric, log_extra)


async def in_keywords(prompts, completions, **kwargs):
    return lengths(completions, kwargs["log_metric"], kwargs["log_extra"])


def named(prompts, completions, **kwargs):
    return lengths(completions, **kwargs)


@pytest.mark.parametrize("function", [named, by_keyword, in_keywords])
def test_functions_that_name_them_or_take_keywords_can_log(function):
    log = ask(function, ["a", "bbb"])
    assert log.metrics() == {"length": 2.0} and log.columns(2) == {"letters": ["a", "bbb"]}
    require_accepts_columns(function, "f", [], "the data")


def test_half_a_character_becomes_a_question_mark_and_what_json_cannot_hold_text():
    call = CallLog("f", [0])
    call.log_extra("half", ["a\ud800"])
    call.log_extra("keys", [{(1, 2): 3}])
    assert call.columns == {"half": ["a?"], "keys": ["{(1, 2): 3}"]}


def test_functions_that_accept_neither_do_not_get_them():
    assert not ask(lambda prompts, completions: [1.0] * len(completions), ["a"]).calls[0].metrics
    with pytest.raises(ValueError, match=r"columns \['log_extra'\], which are arguments of reward functions: rename"):
        require_accepts_columns(by_keyword, "f", ["log_extra"], "the data")


def test_the_mean_over_responses_does_not_depend_on_the_calls():
    """Of 1 and of 3 responses: (1 * 4 + 3 * 2) / 4; a call that logs a name twice counts with its mean."""
    log = RewardLog()
    for rows, values in (([0], [3.0, 5.0]), ([1, 2, 3], [2.0])):
        call = log.begin("f", rows)
        for value in values:
            call.log_metric("m", value)
    assert log.metrics() == {"m": 2.5}


def test_numbers_and_values_of_libraries_become_plain():
    call = CallLog("f", [0, 1])
    for value in (np.float32(1), torch.tensor(2.0), True, np.array(0)):
        call.log_metric("m", value)
    call.log_extra("array", np.array([1, 2]))
    call.log_extra("mixed", [{"deep": np.float64(0.5)}, (1, {2})])
    assert call.metrics == {"m": [1.0, 2.0, 1.0, 0.0]}
    assert call.columns == {"array": [1, 2], "mixed": [{"deep": 0.5}, [1, "{2}"]]}
    json.dumps(call.facts())


def test_a_column_may_be_logged_piece_by_piece():
    def each(prompts, completions, log_extra):
        for text in completions:
            log_extra("said", [text])
        return [0.0] * len(completions)

    assert ask(each, ["a", "b"]).columns(2) == {"said": ["a", "b"]}


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        (lambda m, e: m("", 1), "log_metric takes a name and a number, got '' and 1"),
        (lambda m, e: m("x", "1"), "log_metric takes a name and a number, got 'x' and '1'"),
        (lambda m, e: m("x", [1.0]), "log_metric takes a name and a number"),
        (
            lambda m, e: e("x", "ab"),
            "log_extra takes a column's name and a list with one value per completion, got 'x'",
        ),
        (lambda m, e: e(3, [1, 2]), "log_extra takes a column's name and a list"),
        (lambda m, e: e("score", [1, 2]), r"log_extra\('score', ...\): samples have a column of that name"),
        (lambda m, e: e("x", [1]), r"log_extra\('x', ...\) got 1 values for 2 completions"),
    ],
)
def test_bad_names_kinds_and_lengths_are_one_sentence(logs, message):
    def function(prompts, completions, log_metric, log_extra):
        logs(log_metric, log_extra)
        return [0.0, 0.0]

    with pytest.raises(RewardError, match=f"^reward function 'f': {message}"):
        ask(function, ["a", "b"])


def test_two_functions_cannot_log_one_column():
    with pytest.raises(RewardError, match="'f' and 'g' both log the column 'letters': rename one"):
        score_responses({"f": named, "g": named}, Responses(["p"], ["a"]), log=RewardLog())


def test_two_functions_cannot_log_one_metric():
    def counting(prompts, completions, log_metric):
        log_metric("length", len(completions))
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match="'f' and 'g' both log the metric 'length': rename one"):
        score_responses({"f": counting, "g": counting}, Responses(["p"], ["a"]), log=RewardLog())


def test_a_row_from_the_cache_was_not_logged():
    cache = ScoreCache()
    ask(named, ["a", "bb"], cache)
    log = ask(named, ["bb", "cccc", "a"], cache)
    assert log.columns(3) == {"letters": [None, "cccc", None]} and log.metrics() == {"length": 4.0}
    assert ask(named, ["a"], cache).columns(1) == {}


def test_a_server_logs_through_its_client():
    with serving(named) as address:
        log = ask(client(address, batch_size=2), ["a", "bb", "ccc"])
    assert log.metrics() == {"length": 2.0} and log.columns(3) == {"letters": ["a", "bb", "ccc"]}
    with serving(lambda prompts, completions: [1.0] * len(completions)) as address:
        assert ask(client(address), ["a"]).columns(1) == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"metrics": [1]}, '"metrics" must be {name: number}'),
        ({"metrics": {"x": "1"}}, '"metrics" must be {name: number}'),
        ({"scores": [{"id": "0", "score": 1, "extra": [1]}]}, '"extra" of a score must be {column: value}'),
        ({"scores": [{"id": "0", "score": 1, "extra": {"tokens": 1}}]}, "samples have a column of that name"),
    ],
)
def test_a_server_that_logs_nonsense_is_one_sentence(more, message):
    content = json.dumps({"scores": [{"id": "0", "score": 1}], **more}).encode()
    with answering(lambda *_: (200, content, {})) as (url, _), pytest.raises(RewardError) as raised:
        ask(HTTPReward(url), ["a"])
    assert message in str(raised.value)


def test_a_run_writes_what_was_logged(make_trainer):
    """In metrics, samples, evaluations and recorded rollouts."""

    def function(prompts, completions, log_metric, log_extra, **columns):
        log_metric("length/mean", np.mean([len(text) for text in completions]))
        log_extra("first", [text[:1] for text in completions])
        return [float(len(text)) for text in completions]

    settings = {"total_episodes": 8, "save_rollouts": True, "samples_per_rollout": 8, "rollout_batch_size": 8}
    trainer = make_trainer(reward_funcs=function, eval_dataset=[{"prompt": x} for x in "abcdefghijk"], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    before, update, _ = trainer.run.read()
    samples, evaluated = trainer.run.read("samples.jsonl"), trainer.run.read("eval_samples.jsonl")
    assert all(row["first"] == row["completion"][:1] for row in samples + evaluated)
    assert update["reward/logged/length/mean"] == pytest.approx(np.mean([len(r["completion"]) for r in samples]))
    # Over batches of 8 and 3.
    rows = [row for row in evaluated if row["iteration"] == 0]
    assert before["eval/logged/length/mean"] == pytest.approx(np.mean([len(r["completion"]) for r in rows]))
    line = json.loads((trainer.run.path / "rollouts/rollout-000001.jsonl").read_text().splitlines()[0])
    assert line["logged_columns"] == {"first": line["completion"][:1]}


def test_a_failed_rollout_has_what_was_logged_before(make_trainer, prompts):
    def breaks(prompts, completions, log_extra):
        log_extra("parsed", [text.upper() for text in completions])
        return ["nonsense"] * len(completions)

    trainer = make_trainer(reward_funcs=breaks)
    with pytest.raises(RewardError, match="nonsense"):
        trainer.rollout(prompts)
    rows = trainer.run.read("failed_rollout.jsonl")
    assert len(rows) == 8 and all(row["parsed"] == row["completion"].upper() for row in rows)
