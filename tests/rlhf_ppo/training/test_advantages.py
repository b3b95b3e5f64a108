"""Every estimator's advantages by hand, groups with and without scores, importance weights, and that each learns."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch

from rlhf_ppo import RLHFConfig
from rlhf_ppo.cli import TrainArgs
from rlhf_ppo.core import explained_variance
from rlhf_ppo.runtime.command_line.settings import parse_settings
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.training.advantages import adaptive_lambda, comparable, estimate_advantages
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards

GROUPS = {"num_generations": 4, "rollout_batch_size": 8}
ESTIMATORS = [
    {"advantage_estimator": "gae", **GROUPS},
    {"advantage_estimator": "rloo", **GROUPS},
    {"advantage_estimator": "grpo", **GROUPS},
    {"advantage_estimator": "reinforce"},
]


def config(**settings) -> RLHFConfig:
    return RLHFConfig(**{"output_dir": "run", "rollout_batch_size": 8, **settings})


def values_and_rewards(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, values [4, 5] and a mask with rows of 5, 3, 1 and 0 actions, a hole in the second."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor([5, 4, 1, 0])[:, None]
    mask[1, 1] = False
    rewards, values = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    return rewards * mask, values, mask


# Estimates by hand


def test_groups_compare_the_summed_rewards_of_their_responses():
    """Returns 3, 1 | 0, 4: each against the other (rloo), or over the spread of two, which is half their distance."""
    rewards = torch.tensor([[1.0, 2.0], [0.0, 1.0], [0.0, 0.0], [4.0, 0.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, False]])
    settings = {"num_generations": 2, "rollout_batch_size": 4}
    advantages, returns = estimate_advantages(rewards, None, mask, config(advantage_estimator="rloo", **settings))
    assert advantages.tolist() == [[2, 2], [-2, -2], [-4, 0], [4, 0]] and returns is None
    grpo = config(advantage_estimator="grpo", **settings)
    advantages, _ = estimate_advantages(rewards, None, mask, grpo)
    torch.testing.assert_close(advantages, torch.tensor([[1.0, 1], [-1, -1], [-1, 0], [1, 0]]))
    centred = dataclasses.replace(grpo, normalize_advantages=False)
    assert estimate_advantages(rewards, None, mask, centred)[0].tolist() == [[1, 1], [-1, -1], [-2, 0], [2, 0]]


def test_reinforce_is_the_discounted_return():
    rewards, mask = torch.tensor([[1.0, 0.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = estimate_advantages(rewards, None, mask, config(advantage_estimator="reinforce", gamma=0.5))
    # 2; 0 + .5 * 2; 1 + .5 * 1. Lambda (.95) has no part in it.
    assert advantages.tolist() == [[1.5, 1.0, 2.0]] and returns is None


def test_the_critics_own_lambda_moves_its_targets_alone():
    rewards, values, mask = values_and_rewards()
    plain, split, monte_carlo = (
        estimate_advantages(rewards, values, mask, config(gae_lambda=lam, gae_lambda_value=own))
        for lam, own in ((0.6, None), (0.6, 1.0), (1.0, None))
    )
    assert torch.equal(split[0], plain[0]) and torch.equal(split[1], monte_carlo[1])
    assert not torch.equal(split[1], plain[1])
    same = estimate_advantages(rewards, values, mask, config(gae_lambda=0.6, gae_lambda_value=0.6))
    assert torch.equal(same[0], plain[0]) and torch.equal(same[1], plain[1])


def test_lambda_grows_with_the_response():
    # 1 - 1 / (.5 * n) for n = 8, 4, 2, 1, 0: the last three are held at 0.
    assert adaptive_lambda(torch.tensor([8, 4, 2, 1, 0]), 0.5).tolist() == [0.75, 0.5, 0, 0, 0]
    rewards, values, mask = values_and_rewards()
    settings = config(gae_lambda=0.6, adaptive_lambda_alpha=0.5)
    advantages, returns = estimate_advantages(rewards, values, mask, settings)
    for row, actions in enumerate([5, 3, 1]):
        lam = max(1 - 1 / (0.5 * actions), 0.0)
        alone = [x[[row]] for x in (rewards, values, mask)]
        torch.testing.assert_close(advantages[[row]], estimate_advantages(*alone, config(gae_lambda=lam))[0])
    # The critic keeps gae_lambda.
    torch.testing.assert_close(returns, estimate_advantages(rewards, values, mask, config(gae_lambda=0.6))[1])
    own = estimate_advantages(
        rewards, values, mask, dataclasses.replace(settings, gae_lambda=1.0, gae_lambda_value=1.0)
    )
    torch.testing.assert_close(own[1], estimate_advantages(rewards, values, mask, config(gae_lambda=1.0))[1])


@pytest.mark.parametrize("settings", [{}, {"gae_lambda_value": 1.0}, {"adaptive_lambda_alpha": 0.3}, *ESTIMATORS[1:]])
def test_garbage_outside_the_mask_changes_nothing(settings):
    rewards, values, mask = values_and_rewards(1)
    args = config(**settings)
    values = values if args.has_critic else None
    expected = estimate_advantages(rewards, values, mask, args)
    dirty = None if values is None else values.masked_fill(~mask, math.nan)
    for got, want in zip(estimate_advantages(rewards, dirty, mask, args), expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert torch.equal(got, want) and torch.isfinite(got).all() and (got[~mask] == 0).all()


# Groups in a rollout


def test_every_prompt_has_its_group_side_by_side_with_its_columns(make_trainer):
    trainer = make_trainer(**GROUPS, advantage_estimator="rloo")
    seen = []
    trainer.fixed.rewards.clear()
    trainer.fixed.rewards["r"] = (lambda prompts, completions, number, **_: seen.append(number) or [0.5] * 8, 1.0)
    with pytest.warns(UserWarning, match="constant reward"):
        rollout = trainer.rollout(["a", "no"], number=[1, 2])
    assert rollout.prompts == ["a"] * 4 + ["no"] * 4 and seen == [[1] * 4 + [2] * 4]
    assert len({tuple(row) for row in rollout.response_ids.tolist()}) > 4  # drawn apart


def test_training_uses_every_prompt_once_per_epoch(make_trainer, prompts):
    trainer = make_trainer(**GROUPS, advantage_estimator="grpo", total_episodes=32, num_epochs=1, samples_per_rollout=8)
    metrics = trainer.train()
    assert metrics["progress/episodes"] == 32  # responses, not prompts
    assert Counter(row["prompt"] for row in trainer.run.read("samples.jsonl")) == dict.fromkeys(prompts, 4)


def test_unscored_responses_leave_smaller_groups_and_lone_ones_train_nothing(make_trainer):
    """Of two groups one has three scores and one a single score, which nothing can be compared with."""
    scores = [1.0, None, 3.0, 5.0, None, None, 7.0, None]
    for settings in ESTIMATORS[1:3]:
        trainer = make_trainer(
            **settings, reward_funcs=lambda p, c, **_: scores, kl_coef=0.0, normalize_advantages=False
        )
        rollout = trainer.rollout(["once upon", "no"])
        old = estimate(rollout, shape_rewards(rollout, trainer.args, 0.0), trainer.args).experience
        # Mean of the three 3; mean of the other two: 4, 3, 2.
        expected = [-3, 0, 0, 3] if settings["advantage_estimator"] == "rloo" else [-2, 0, 0, 2]
        assert old.advantages[:4, 0].tolist() == pytest.approx(expected)
        assert old.mask.any(dim=1).tolist() == [True, False, True, True, False, False, False, False]
        assert (old.advantages[4:] == 0).all()
        metrics = trainer.step(rollout)
        assert all(math.isfinite(metrics[key]) for key in ("policy/loss", "optim/grad_norm"))


def test_the_kl_cost_is_part_of_what_groups_compare(make_trainer, make_model):
    trainer = make_trainer(**ESTIMATORS[1], ref_model=make_model(seed=3), kl_coef=0.5, normalize_advantages=False)
    rollout = trainer.rollout(["once upon", "no"])
    old = estimate(rollout, shape_rewards(rollout, trainer.args, 0.5), trainer.args).experience
    totals = (rollout.scores - 0.5 * (rollout.logprobs - rollout.ref_logprobs).sum(dim=1)).view(2, 4)
    expected = totals - (totals.sum(dim=1, keepdim=True) - totals) / 3
    torch.testing.assert_close(old.advantages[:, 0], expected.flatten().float())


def test_scores_per_token_are_summed_for_the_comparison(make_trainer):
    def steps(prompts, completions, completion_ids, **_):
        return [[float(i % 3) for i in ids] for ids in completion_ids]

    trainer = make_trainer(**ESTIMATORS[1], reward_funcs=steps, kl_coef=0.0, normalize_advantages=False)
    rollout = trainer.rollout(["once upon", "no"])
    old = estimate(rollout, shape_rewards(rollout, trainer.args, 0.0), trainer.args).experience
    totals = ((rollout.response_ids % 3) * rollout.mask).sum(dim=1).view(2, 4).float()
    expected = totals - (totals.sum(dim=1, keepdim=True) - totals) / 3
    torch.testing.assert_close(old.advantages[:, 0], expected.flatten())


def test_turns_of_a_conversation_reach_the_ratio(make_trainer):
    trainer = make_trainer(
        respond=lambda messages: " no", max_turns=3, max_new_tokens=3, ratio_level="turn", microbatch_tokens=8, **GROUPS
    )
    rollout = trainer.rollout(["once upon", "a"])
    old = estimate(rollout, shape_rewards(rollout, trainer.args, 0.05), trainer.args).experience
    assert int(old.turns[old.mask].max()) == 2
    assert math.isfinite(trainer.step(rollout)["policy/loss"])


def test_settings_are_flags_too(tmp_path):
    (tmp_path / "run.yaml").write_text("advantage_estimator: rloo\nnum_generations: 4\nkl_loss_coef: 1e-2\n")
    flags = "--model m --reward r --dataset d --output-dir o --objective cispo --ratio-level sequence".split()
    args = parse_settings(TrainArgs, ["--config", str(tmp_path / "run.yaml"), *flags], prog="train")
    assert (args.advantage_estimator, args.num_generations, args.kl_loss_coef) == ("rloo", 4, 0.01)
    assert (args.objective, args.ratio_level, args.has_critic) == ("cispo", "sequence", False)


def test_a_rollout_of_incomplete_groups_is_refused():
    with pytest.raises(ValueError, match="6 responses are not whole groups of num_generations=4"):
        comparable(torch.ones(6, dtype=torch.bool), config(**ESTIMATORS[1]))


@pytest.mark.parametrize("settings", ESTIMATORS[1:], ids=lambda s: s["advantage_estimator"])
def test_no_critic_is_built_if_none_is_read(make_trainer, make_model, settings):
    trainer = make_trainer(**settings)
    assert trainer.model.value_head is None
    assert not (trainer.save_model() / "value_head.safetensors").exists()
    name = settings["advantage_estimator"]
    with pytest.raises(ValueError, match=f"advantage_estimator='{name}' has no critic, but a value_model"):
        make_trainer(**settings, value_model=make_model())


@pytest.mark.parametrize("normalize_values", [True, False])
def test_a_critic_is_measured_on_whole_returns_under_every_lambda(make_trainer, prompts, wake_critic, normalize_values):
    """Targets under a smaller lambda hold the critic's own values, which would make any critic look good."""
    trainer = make_trainer(normalize_values=normalize_values)
    wake_critic(trainer.model)
    rollout = trainer.rollout(prompts)
    rewards, found = shape_rewards(rollout, trainer.args, 0.05), []
    for settings in ({}, {"gae_lambda": 0.0}, {"gae_lambda": 0.95, "gae_lambda_value": 0.5}):
        estimates = estimate(rollout, rewards, dataclasses.replace(trainer.args, **settings))
        found.append([estimates.metrics[f"value/{name}"] for name in ("explained_variance", "return_mean")])
        old = estimates.experience
    assert found[1] == pytest.approx(found[0], abs=1e-6) and found[2] == pytest.approx(found[0], abs=1e-6)
    assert explained_variance(old.values, old.returns, old.mask) > found[0][0] + 0.2


# Importance weights


def recomputing(make_trainer, **settings) -> PPOTrainer:
    return make_trainer(recompute_logprobs=True, **settings)


def test_a_sampler_that_agrees_has_weights_of_1(make_trainer, prompts):
    trainer = recomputing(make_trainer, importance_weight_cap=2.0)
    rollout = trainer.rollout(prompts)
    estimates = estimate(rollout, shape_rewards(rollout, trainer.args, 0.05), trainer.args)
    old, metrics = estimates.experience, estimates.metrics
    # Float32: decoding and the full pass differ by about 1e-6.
    torch.testing.assert_close(old.weights, rollout.mask.float(), atol=1e-4, rtol=0)
    assert metrics["policy/importance_weight_mean"] == pytest.approx(1, abs=1e-4)
    assert metrics["policy/importance_capped_fraction"] == 0
    without = recomputing(make_trainer)
    rollout = without.rollout(prompts)
    assert estimate(rollout, shape_rewards(rollout, without.args, 0.05), without.args).experience.weights is None


def test_weights_correct_a_sampler_that_disagrees(make_trainer, prompts):
    """The sampler's log-probs moved by hand: weights are the ratio to the recomputed ones up to the cap."""
    trainer = recomputing(make_trainer, importance_weight_cap=1.5, num_minibatches=1, num_epochs=1)
    rollout = trainer.rollout(prompts)
    assert rollout.sampled_logprobs is not None
    gap = torch.linspace(-1, 1, rollout.mask.numel()).view(rollout.mask.shape)
    moved = dataclasses.replace(rollout, sampled_logprobs=(rollout.logprobs - gap) * rollout.mask)
    estimates = estimate(moved, shape_rewards(moved, trainer.args, 0.05), trainer.args)
    old, metrics = estimates.experience, estimates.metrics
    expected = gap.exp().clamp(max=1.5)[rollout.mask]
    torch.testing.assert_close(old.weights[rollout.mask], expected)
    assert metrics["policy/importance_weight_mean"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert metrics["policy/importance_capped_fraction"] == pytest.approx(
        float((gap[rollout.mask] > math.log(1.5)).float().mean())
    )
    trainer.run.log(trainer.step(moved))  # every key is in the metric dictionary, and the tripwire sees no gap
    with pytest.raises(ValueError, match=r"importance_weight_cap=1.5 needs the sampler's own log-probs"):
        trainer.step(dataclasses.replace(rollout, sampled_logprobs=None))


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("settings", ESTIMATORS, ids=lambda s: s["advantage_estimator"])
def test_every_estimator_learns(make_trainer, settings, learning_seed):
    """The share of early letters, a half by chance, rises."""
    trainer = make_trainer(
        **{**settings, "rollout_batch_size": 32},
        total_episodes=32 * 12,
        learning_rate=1e-2,
        kl_coef=0.0,
        num_epochs=2,
        lr_scheduler_type="constant",
        seed=learning_seed,
    )
    scores = []
    trainer.callbacks.append(lambda _, metrics: scores.append(metrics["score/mean"]))
    trainer.train()
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15, scores
