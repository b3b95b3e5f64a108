"""Watching a run: a symptom is warned of once and written down, or stops the run; judges score and never train."""

from __future__ import annotations

import json
import logging
import random

import pytest

from rlhf_ppo.runtime.errors import UnhealthyRunError
from rlhf_ppo.training.reports.watching import begin_watch


def constant(prompts, completions, **columns):
    return [0.5 for _ in completions]


def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


LONG = {"total_episodes": 8 * 16, "num_epochs": 1}


@pytest.mark.filterwarnings("ignore:every response scored")
def test_a_run_without_signal_is_warned_of_once_and_goes_on(make_trainer, caplog):
    trainer = make_trainer(reward_funcs=constant, kl_coef=0.0, **LONG)
    with caplog.at_level(logging.WARNING, logger="rlhf_ppo"):
        trainer.train()
    (said,) = [record.message for record in caplog.records if "no signal" in record.message]
    assert said.startswith("after 12 updates: no signal: scores differ by 0 within a rollout. The reward is the same")
    rows = [row for row in trainer.run.read("watch.jsonl") if row["symptom"] == "no_signal"]
    assert [row["iteration"] for row in rows] == [12] and trainer.iteration == 16


@pytest.mark.filterwarnings("ignore:every response scored")
@pytest.mark.parametrize("settings", [{"watch": "stop"}, {"stop_on": ("no_signal",)}])
def test_a_symptom_stops_the_run_with_a_checkpoint(make_trainer, settings):
    trainer = make_trainer(reward_funcs=constant, kl_coef=0.0, **LONG, **settings)
    with pytest.raises(UnhealthyRunError, match=r"no signal: .* Resume with resume_from_checkpoint=.*checkpoint-12"):
        trainer.train()
    assert trainer.iteration == 12 and (trainer.run.path / "checkpoint-12").is_dir()


@pytest.mark.filterwarnings("ignore:every response scored")
def test_a_run_that_is_not_watched_says_nothing(make_trainer, caplog):
    trainer = make_trainer(reward_funcs=constant, kl_coef=0.0, watch="off", **LONG)
    trainer.train()
    assert not caplog.records and not (trainer.run.path / "watch.jsonl").exists()


def test_judges_score_some_responses_of_each_rollout_and_change_nothing(make_trainer):
    asked: list[int] = []

    def judge(prompts, completions, **columns):
        asked.append(len(completions))
        random.random()
        return [None if i == 0 else float(len(text)) for i, text in enumerate(completions)]

    judged, plain = make_trainer(judge_funcs=[judge, vowels], judge_responses=3), make_trainer()
    judged.train(), plain.train()
    assert asked == [3, 3]
    ours, theirs = judged.run.read(), plain.run.read()
    for row, other in zip(ours, theirs, strict=True):
        means = [row.pop(f"judge/part/{name}") for name in ("judge", "vowels")]
        assert row.pop("judge/score_mean") == pytest.approx(sum(means) / 2) and row == other


def test_a_judge_that_fails_is_warned_of_once_and_the_run_goes_on(make_trainer, caplog):
    def judge(prompts, completions, **columns):
        raise OSError("no answer today")

    trainer = make_trainer(judge_funcs=judge)
    trainer.train()
    (said,) = [record.message for record in caplog.records]
    assert "judge failed, and the run goes on" in said and "no answer today" in said
    assert "judge/score_mean" not in trainer.run.read()[-1]


def test_a_reward_cannot_judge_itself(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"judge .*vowels' is also a reward: what trains a run cannot judge it"):
        make_trainer(reward_funcs=[constant, vowels], judge_funcs=vowels)
    (tmp_path / "mine.py").write_text("def f(prompts, completions):\n    return [1.0 for _ in completions]\n")
    rows = [{"prompt": "a", "answer": "b"}] * 8
    with pytest.raises(ValueError, match=r"reward function 'f' has the parameters .*'answer'"):
        make_trainer(judge_funcs=f"{tmp_path}/mine.py:f", train_dataset=rows)


def test_what_a_watch_writes_is_rewound_with_the_run(make_trainer, tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path / "run"))
    for iteration in (1, 5):
        trainer.run.append("watch.jsonl", {"iteration": iteration, "symptom": "kl"})
    trainer.run.rewind(3)
    assert [json.loads(line)["iteration"] for line in (tmp_path / "run/watch.jsonl").open()] == [1]


@pytest.mark.parametrize(("stop_on", "said"), [((), {"no signal"}), (("no_signal",), set())])
def test_a_resumed_run_does_not_repeat_what_it_said(make_trainer, stop_on, said):
    trainer = make_trainer(stop_on=stop_on)
    trainer.run.append("watch.jsonl", {"iteration": 3, "symptom": "no_signal", "rule": "no signal"})
    first = begin_watch(trainer.fixed)
    assert first is not None and first._said == said
    first.updates = 7
    again = begin_watch(trainer.fixed, first)
    assert again is not None and again.updates == 7


def test_the_spread_of_the_tokens_scores_is_logged(make_trainer):
    def first_token(prompts, completions, completion_ids, **columns):
        return [[1.0] + [0.0] * (len(ids) - 1) if ids else [] for ids in completion_ids]

    metrics = make_trainer(reward_funcs=first_token, total_episodes=8).train()
    assert metrics["score/token_std"] > 0.05
