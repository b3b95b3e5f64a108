"""Score shaping: each step by hand, their order, and statistics that survive a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from rlhf_ppo import RLHFConfig
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.training.rewards import RunningMoments, ScoreStatistics, shape_scores


def written_rollout(**changes) -> Rollout:
    """Three responses of 3, 2 and 1 tokens; the first ran into the limit."""
    rollout = Rollout(
        prompts=["a", "b", "c"],
        columns={},
        prompt_ids=torch.ones(3, 1, dtype=torch.long),
        prompt_mask=torch.ones(3, 1, dtype=torch.bool),
        response_ids=torch.ones(3, 3, dtype=torch.long),
        mask=torch.tensor([[True, True, True], [True, True, False], [True, False, False]]),
        finished=torch.tensor([False, True, True]),
        logprobs=torch.zeros(3, 3),
        entropy=torch.zeros(3, 3),
        values=None,
        completions=["aaa", "bb", "c"],
        scores=torch.tensor([10.0, 4.0, 0.0]),
        scored=torch.ones(3, dtype=torch.bool),
        score_parts={"one": [10.0, 4.0, 0.0]},
    )
    return dataclasses.replace(rollout, **changes)


def shaped(rollout: Rollout, statistics: ScoreStatistics | None = None, **settings):
    args = RLHFConfig(output_dir="run", **settings)
    return shape_scores(rollout, rollout.mask & rollout.scored[:, None], args, statistics)


def test_by_default_scores_stay_as_they_are():
    result = shaped(written_rollout())
    assert result.rewards is result.scores and result.scores.tolist() == [10, 4, 0]
    # 14/3, and the spread of (10, 4, 0): sqrt(116/3 - (14/3)^2).
    assert result.metrics["score/shaped_mean"] == pytest.approx(14 / 3)
    assert result.metrics["score/shaped_std"] == pytest.approx(math.sqrt(116 / 3 - (14 / 3) ** 2), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"score_clip": 6.0}, [6, 4, 0]),
        ({"missing_eos_penalty": 1.5}, [8.5, 4, 0]),
        ({"missing_eos_penalty": 1.5, "missing_eos_mode": "replace"}, [-1.5, 4, 0]),
        # Zero is a penalty like any other: the score is replaced by it.
        ({"missing_eos_penalty": 0.0, "missing_eos_mode": "replace"}, [0, 4, 0]),
        # A penalty comes after the clip, so it is not cut off.
        ({"score_clip": 1.0, "missing_eos_penalty": 5.0}, [-4, 1, 0]),
    ],
)
def test_each_step_by_hand(settings, expected):
    result = shaped(written_rollout(), **settings)
    assert result.scores.tolist() == pytest.approx(expected)
    assert result.metrics["score/shaped_mean"] == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_negative_scores_are_clipped_and_counted():
    result = shaped(written_rollout(scores=torch.tensor([-9.0, 2.0, 0.5])), score_clip=2.0)
    assert result.scores.tolist() == [-2.0, 2.0, 0.5]
    assert result.metrics["score/clipped_fraction"] == pytest.approx(1 / 3)


def test_running_moments_equal_those_of_all_numbers():
    values = np.random.default_rng(0).normal(1e6, 3.0, 1000).tolist()
    moments = RunningMoments()
    for part in (values[:1], values[1:400], [], values[400:]):
        moments.add(part)
    assert moments.count == 1000
    assert moments.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert moments.std == pytest.approx(np.std(values), rel=1e-9)
    # One number, or the same one again, has no spread to divide by.
    for same in ([], [3.0], [0.1] * 50):
        moments = RunningMoments()
        moments.add(same)
        assert moments.std == 1.0


def test_each_function_is_normalised_by_its_own_history():
    """one: 10, 4, 0 after 2, 2 -> mean 3.6; two: 1, 1, 4 -> mean 2, variance 2."""
    statistics = ScoreStatistics()
    statistics.add(written_rollout(score_parts={"one": [2.0, 2.0, 99.0]}, scored=torch.tensor([True, True, False])))
    rollout = written_rollout(score_parts={"one": [10.0, 4.0, 0.0], "two": [1.0, 1.0, 4.0]})
    statistics.add(rollout)
    one = [2, 2, 10, 4, 0]
    result = shaped(rollout, statistics, normalize_scores=True, reward_weights=(1.0, -2.0))
    expected = [
        (s - 3.6) / float(np.std(one)) - 2 * (t - 2) / math.sqrt(2) for s, t in zip([10, 4, 0], [1, 1, 4], strict=True)
    ]
    assert result.scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert result.metrics["score/running_mean/one"] == pytest.approx(3.6)
    assert result.metrics["score/running_std/two"] == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_unscored_responses_never_enter_the_statistics(make_trainer, prompts, missing):
    trainer = make_trainer(
        reward_funcs=lambda p, c, **_: [missing, *range(7)], normalize_scores=True, drop_nonfinite_scores=True
    )
    metrics = trainer.step(trainer.rollout(prompts))
    (moments,) = trainer.score_statistics.moments.values()
    assert (moments.count, moments.mean) == (7, 3.0) and moments.std == pytest.approx(2.0)
    # The raw scores stay raw.
    assert metrics["score/mean"] == 3.0 and metrics["score/shaped_mean"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["score/shaped_std"] == pytest.approx(1.0, abs=1e-5)


def test_evaluation_and_rollouts_that_are_not_trained_on_do_not_move_the_statistics(make_trainer, prompts):
    trainer = make_trainer(normalize_scores=True, eval_dataset=[{"prompt": p} for p in prompts])
    trainer.evaluate()
    rollout = trainer.rollout(prompts)
    assert trainer.score_statistics.moments == {}
    trainer.step(rollout)
    assert trainer.score_statistics.moments["early_letters"].count == 8


def test_a_resumed_run_continues_its_statistics(make_trainer):
    """Scores grow from rollout to rollout, so that a run which forgot its mean would end elsewhere."""

    def growing():
        calls = iter(range(1000))
        return lambda p, c, **_: [float(len(text) * 2 ** next(calls)) for text in c]

    settings = {"total_episodes": 32, "save_every": 2, "normalize_scores": True}
    whole = make_trainer(reward_funcs=growing(), **settings)
    whole.train()
    reward = growing()
    cut = make_trainer(reward_funcs=reward, callbacks=[lambda t, m: t.iteration == 2], **settings)
    cut.train()
    state = json.loads((cut.run.path / "checkpoint-2/state.json").read_text())
    assert state["score_statistics"]["<lambda>"]["count"] == 16
    resumed = make_trainer(reward_funcs=reward, **{**settings, "output_dir": cut.args.output_dir})
    resumed.train(resume_from_checkpoint=cut.run.path / "checkpoint-2")
    assert resumed.run.read() == whole.run.read()
    assert resumed.score_statistics == whole.score_statistics
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def token_rollout(**changes) -> Rollout:
    """As above, but 6 of the first response's 10 belong to its tokens, and 3 of the second's 4."""
    tokens = torch.tensor([[1.0, 2.0, 3.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    return written_rollout(token_scores=tokens, token_score_parts={"one": tokens}, **changes)


def test_token_rewards_are_multiplied_where_the_sum_is_and_the_rest_lands_on_the_last_token():
    plain = shaped(token_rollout())
    assert plain.rewards.tolist() == [[1, 2, 7], [3, 1, 0], [0, 0, 0]]
    clipped = shaped(token_rollout(), score_clip=5.0, missing_eos_penalty=0.5)
    # 10, 4, 0 -> 5, 4, 0 -> 4.5, 4, 0: the first did not finish.
    assert clipped.scores.tolist() == pytest.approx([4.5, 4, 0])
    assert clipped.rewards[0].tolist() == pytest.approx([1.0, 2.0, 1.5])
    assert clipped.rewards[1:].tolist() == [[3, 1, 0], [0, 0, 0]]
    replaced = shaped(token_rollout(), missing_eos_penalty=2.0, missing_eos_mode="replace")
    assert replaced.rewards.tolist() == [[0, 0, -2], [3, 1, 0], [0, 0, 0]]


def test_normalised_token_rewards_add_up_to_the_normalised_score():
    statistics = ScoreStatistics()
    rollout = token_rollout()
    statistics.add(rollout)
    result = shaped(rollout, statistics, normalize_scores=True)
    std = float(np.std([10, 4, 0]))
    assert result.rewards.sum(dim=1).tolist() == pytest.approx([(s - 14 / 3) / std for s in (10, 4, 0)], abs=1e-5)
    assert result.rewards[0, :2].tolist() == pytest.approx([1 / std, 2 / std])


def test_unscored_responses_count_in_no_metric():
    result = shaped(written_rollout(scored=torch.tensor([True, False, False])), score_clip=5.0)
    assert result.metrics["score/shaped_mean"] == 5 and result.metrics["score/clipped_fraction"] == 1


@pytest.mark.parametrize(
    ("settings", "both"),
    [
        ({"missing_eos_mode": "replace"}, ("missing_eos_mode='replace'", "missing_eos_penalty")),
    ],
)
def test_fault_30_contradictions_name_both(settings, both):
    with pytest.raises(ValueError) as error:
        RLHFConfig(output_dir="run", **settings)
    assert all(name in str(error.value) for name in both)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("score_clip", 0.0),
        ("missing_eos_mode", "add"),
        ("http_batch_size", 0),
        ("http_retries", -1),
        ("http_timeout_s", 0.0),
        ("reward_max_length", 0),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        RLHFConfig(output_dir="run", **{name: value})
