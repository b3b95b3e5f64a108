"""Prompts whose responses all score alike: kept, left out of the update, or replaced."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from rlhf_ppo import RLHFConfig
from rlhf_ppo.generation.rollout import Rollout, pick_rows
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.training.advantages import with_signal
from tests.rlhf_ppo.conftest import early_letters

PROMPTS = ["once upon", "the cat", "a", "dog and cow", "she said", "blue", "no", "why not go"]
SILENT = ("the cat", "blue", "no")
GROUPS = {"num_generations": 2, "advantage_estimator": "grpo", "zero_signal_prompts": "resample"}


def some_silent(prompts, completions, **columns: Any) -> list[float]:
    """Responses to three of the prompts all score 0.5."""
    letters = early_letters(prompts, completions)
    # The length tells apart what has as many early letters.
    return [0.5 if p in SILENT else x + len(t) for p, x, t in zip(prompts, letters, completions, strict=True)]


def test_a_signal_is_two_scored_responses_that_differ():
    scores = torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0, 2.0, 3.0, 3.0])
    scored = torch.tensor([True, True, True, True, True, False, False, False])
    assert with_signal(scores, scored, 2).tolist() == [False, False, True, True, False, False, False, False]
    with pytest.raises(ValueError, match="8 responses are not whole groups of num_generations=3"):
        with_signal(scores, scored, 3)


@pytest.mark.parametrize(
    "estimator", [{"advantage_estimator": "grpo"}, {"advantage_estimator": "gae", "positive_loss_coef": 0.5}]
)
def test_dropping_prompts_equals_never_having_sampled_them(make_trainer, make_model, wake_critic, estimator):
    """One optimizer step on four groups, two of them silent, against one on the other two alone."""
    settings = {**estimator, "num_generations": 2, "num_epochs": 1, "num_minibatches": 1, "kl_coef": 0.3}
    prompts = ["once upon", "the cat", "blue", "she said"]
    gradients, metrics = [], []
    for drop in (True, False):
        how = "drop" if drop else "keep"
        trainer = make_trainer(make_model(), some_silent, zero_signal_prompts=how, **settings)
        if trainer.args.has_critic:
            wake_critic(trainer.model)
        rollout = trainer.rollout(prompts)
        metrics.append(trainer.step(rollout if drop else pick_rows(rollout, rollout, [0, 1, 6, 7])))
        # Adam's first moments are the gradient; in the weights it blows up the rounding of gradients that are 0.
        gradients.append([entry["exp_avg"] for entry in trainer.optimizer.state.values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    dropped, kept = metrics
    assert dropped["score/zero_signal_fraction"] == 0.5 and dropped["score/dropped_prompts"] == 2
    assert kept["score/zero_signal_fraction"] == 0 and "score/dropped_prompts" not in kept
    for name in ("policy/loss", "policy/approx_kl", "optim/grad_norm", "advantage/std"):
        assert dropped[name] == pytest.approx(kept[name], rel=1e-4, abs=1e-6), name


def test_a_rollout_without_any_signal_changes_no_statistic_and_stays_finite(make_trainer, prompts):
    silent = lambda prompts, completions, **_: [1.0] * len(completions)  # noqa: E731
    settings = {**GROUPS, "zero_signal_prompts": "drop", "kl_loss_coef": 0.1, "kl_loss": "k2"}
    trainer = make_trainer(reward_funcs=silent, **settings)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.warns(UserWarning, match="a constant reward gives no signal"):
        metrics = trainer.step(trainer.rollout(prompts[:4]))
    assert metrics["score/dropped_prompts"] == 4 and metrics["optim/skipped_steps"] == 0
    # Averages over no action are undefined, and not logged.
    assert {name.partition("/")[0] for name, x in metrics.items() if not math.isfinite(x)} == {"policy"}
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def train(make_trainer, folder: Any = None, **settings: Any) -> Any:
    small = {"total_episodes": 24, "rollout_batch_size": 8, "save_every": 1, "samples_per_rollout": 8, **GROUPS}
    trainer = make_trainer(**{"reward_funcs": some_silent, **small, **settings})
    trainer.train(resume_from_checkpoint=folder)
    return trainer


def test_silent_prompts_are_replaced_and_counted(make_trainer):
    asked = []

    def noting(prompts, completions, **columns):
        asked.extend(prompts[::2])
        return some_silent(prompts, completions)

    trainer = train(make_trainer, zero_signal_rounds=10, reward_funcs=noting)
    # One stream of passes, of which no prompt is drawn twice.
    order = trainer.train_prompts.order
    assert asked == trainer.train_prompts.take(order.rows(0, len(asked), len(asked))).prompts
    lines, samples = trainer.run.read(), trainer.run.read("samples.jsonl")
    assert len(samples) == 24 and not {row["prompt"] for row in samples} & set(SILENT)
    assert all(one["score"] != other["score"] for one, other in zip(samples[::2], samples[1::2], strict=True))
    assert trainer.state.extra_prompts == sum(line["score/resampled_prompts"] for line in lines) >= 4
    for line in lines:
        # One was drawn for each that was silent, and none is left out.
        drawn = line["score/resampled_prompts"]
        assert line["score/dropped_prompts"] == 0
        assert line["score/zero_signal_fraction"] == pytest.approx(drawn / (4 + drawn))
    assert any(line["score/first_draw_mean"] != line["score/mean"] for line in lines)
    assert trainer.episodes == 24 and trainer.rollouts_made > 3


def test_the_same_seed_and_a_resumed_run_draw_the_same(make_trainer):
    whole, again = train(make_trainer), train(make_trainer)
    resumed = train(make_trainer, whole.run.path / "checkpoint-1")
    for other in (again, resumed):
        assert other.run.read() == whole.run.read()
        assert other.run.read("samples.jsonl") == whole.run.read("samples.jsonl")


def test_rounds_are_bounded_and_the_rest_is_left_out(make_trainer):
    asked = []

    def silent(prompts, completions, **columns):
        asked.append(len(prompts))
        return [1.0 if len(asked) < 4 else float(i) for i in range(len(completions))]

    settings = {"total_episodes": 8, "rollout_batch_size": 8, "zero_signal_rounds": 2, **GROUPS}
    with pytest.warns(UserWarning, match="constant reward"):
        trainer = make_trainer(reward_funcs=silent, **settings)
        trainer.train()
    (line,) = trainer.run.read()
    assert asked == [8, 8, 8] and line["score/dropped_prompts"] == 4 and line["score/resampled_prompts"] == 8
    assert line["score/zero_signal_fraction"] == 1 and line["optim/skipped_steps"] == 0


def test_a_reward_that_fails_on_further_prompts_resumes_with_the_same_rollout(make_trainer):
    calls = []

    def failing(prompts, completions, **columns):
        calls.append(list(completions))
        if len(calls) == 2:
            raise RuntimeError("down")
        return [0.5 if completions == calls[0] else float(i) for i in range(len(completions))]

    settings = {"total_episodes": 8, "rollout_batch_size": 8, **GROUPS}
    trainer = make_trainer(reward_funcs=failing, **settings)
    with pytest.raises(RewardError, match="down"):
        trainer.train()
    assert trainer.state.extra_prompts == trainer.rollouts_made == 0
    trainer.train(resume_from_checkpoint=trainer.run.path)
    assert calls[2:4] == calls[:2]


def test_rows_of_rollouts_of_other_widths_are_picked_by_field(make_trainer):
    trainer = make_trainer(reward_funcs=lambda prompts, completions, completion_ids, **_: [
        [float(k) for k in range(len(ids))] for ids in completion_ids
    ], num_generations=1)  # fmt: skip
    one, other = trainer.rollout(["a", "once upon"]), trainer.rollout(["dog and cow", "no"], note=[1, 2])
    picked = pick_rows(one, other, [2, 1])
    assert picked.prompts == ["dog and cow", "once upon"] and picked.columns == {"note": [1, None]}
    for rollout, row, place in ((other, 0, 0), (one, 1, 1)):
        own, now = rollout.sequences([row]), picked.sequences([place])
        assert torch.equal(own.prompt_ids, now.prompt_ids) and torch.equal(own.response_ids, now.response_ids)
        length = int(rollout.lengths[row])
        for name in ("logprobs", "values", "ref_logprobs", "token_scores", "entropy"):
            assert torch.equal(getattr(rollout, name)[row, :length], getattr(picked, name)[place, :length])
        assert picked.scores[place] == rollout.scores[row]
        assert picked.completions[place] == rollout.completions[row]
    bare = dataclasses.replace(one, token_scores=None, token_score_parts={}, sampled_logprobs=one.logprobs)
    mixed = pick_rows(bare, other, [0, 3])
    assert float(mixed.token_scores[0].abs().sum()) == 0 and mixed.token_scores.shape == mixed.mask.shape
    assert all(
        getattr(mixed, f.name) is not None for f in dataclasses.fields(Rollout) if getattr(one, f.name) is not None
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"zero_signal_prompts": "drop"},
            "num_generations=1 gives each only one: set num_generations to 2 or more",
        ),
        ({"zero_signal_rounds": 3}, "zero_signal_prompts='keep' draws no further prompts"),
        ({"zero_signal_prompts": "resample", "num_generations": 2, "replay": "runs/x"}, "set it to 'drop' or 'keep'"),
        ({"curriculum_column": "level", "replay": "runs/x"}, "trains on recorded prompts in their own order"),
        ({"curriculum_start": 0.5}, "curriculum_column=None orders no prompts"),
        ({"curriculum_column": "level", "curriculum_span": 0.0}, "curriculum_span must be above 0 and at most 1"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RLHFConfig(output_dir="x", **settings)
