"""Every objective trains a language model, and those that adapt move what they steer."""

from __future__ import annotations

import math

import pytest

from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards

OBJECTIVES = ["clip", "penalty", "adaptive_clip", "dual_clip", "cispo", "dis", "a2c", "reinforce"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_with_finite_metrics_that_moves_the_policy(make_trainer, prompts, objective):
    trainer = make_trainer(objective=objective, target_kl=0.05 if objective == "adaptive_clip" else None, ent_coef=0.01)
    before = trainer.model.policy.lm_head.weight.detach().clone()
    metrics = trainer.step(trainer.rollout(prompts))
    assert all(math.isfinite(value) for value in metrics.values())
    assert not before.equal(trainer.model.policy.lm_head.weight)
    assert metrics["progress/optimizer_steps"] == 4
    trainer.run.log(metrics)  # every key is in the metric dictionary


def test_reinforce_has_no_critic(make_trainer, prompts):
    trainer = make_trainer(objective="reinforce")
    assert trainer.model.value_head is None
    rollout = trainer.rollout(prompts)
    assert rollout.values is None
    estimates = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args)
    assert estimates.experience.values is None and estimates.experience.returns is None
    assert estimates.values is None and estimates.value_scale is None
    assert not any(key.startswith("value/") for key in estimates.metrics)
    assert not (trainer.save_model() / "value_head.safetensors").exists()


def test_reinforce_ignores_lambda(make_trainer, prompts):
    """Its advantage is the return: without KL cost and discount every token of a response gets the score."""
    trainer = make_trainer(objective="reinforce", kl_coef=0.0, normalize_advantages=False)
    rollout = trainer.rollout(prompts)
    old = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
    for row, keep in enumerate(rollout.mask):
        assert old.advantages[row][keep].tolist() == [rollout.scores[row].float()] * int(keep.sum())


# Learning rate 0 keeps the KL of the update at 0, far below any target; a large one drives it far above.
@pytest.mark.parametrize(("learning_rate", "factor"), [(0.0, 0.5), (0.03, 2.0)])
def test_penalty_moves_beta_once_an_update(make_trainer, prompts, learning_rate, factor):
    trainer = make_trainer(objective="penalty", penalty_beta=0.1, target_kl=1e-3, learning_rate=learning_rate)
    first = trainer.step(trainer.rollout(prompts))
    assert first["policy/penalty_beta"] == 0.1  # what was in force
    assert first["optim/epochs"] == 2  # steered, not stopped
    assert trainer.objective.penalty_beta == pytest.approx(0.1 * factor)
    assert trainer.step(trainer.rollout(prompts))["policy/penalty_beta"] == pytest.approx(0.1 * factor)


@pytest.mark.parametrize(("learning_rate", "clip_range"), [(0.0, 0.4), (0.03, 0.1)])
def test_adaptive_clip_moves_the_clip_range_once_an_update(make_trainer, prompts, learning_rate, clip_range):
    trainer = make_trainer(objective="adaptive_clip", clip_range=0.2, target_kl=1e-3, learning_rate=learning_rate)
    trainer.step(trainer.rollout(prompts))
    assert trainer.objective.clip_range == pytest.approx(clip_range)
    for _ in range(5):
        metrics = trainer.step(trainer.rollout(prompts))
    assert 0.02 <= metrics["policy/clip_range"] <= 0.5  # bounded


def test_without_a_target_beta_is_fixed(make_trainer, prompts):
    trainer = make_trainer(objective="penalty", penalty_beta=0.7)
    trainer.step(trainer.rollout(prompts))
    assert trainer.objective.penalty_beta == 0.7


def test_dual_clip_bounds_what_clip_does_not(make_trainer, prompts):
    """A < 0 and a ratio far above 1: the clip loss grows with the ratio, dual clip stops at dual_clip * |A|."""
    import dataclasses

    losses = {}
    for objective, bound in (("clip", {}), ("dual_clip", {"dual_clip": 1.5})):
        trainer = make_trainer(
            objective=objective, learning_rate=0.0, max_initial_log_ratio=99.0, num_minibatches=1, **bound
        )
        rollout = trainer.rollout(prompts)
        old_logprobs = rollout.mask * (rollout.logprobs - 3.0)  # ratio e^3 everywhere
        rollout = dataclasses.replace(rollout, logprobs=old_logprobs, ref_logprobs=old_logprobs)
        losses[objective] = trainer.step(rollout)["policy/loss"]
    # Whitened advantages: their negative part enters with e^3 = 20 under clip, with 1.5 under dual_clip.
    assert losses["dual_clip"] < 1.5 < losses["clip"]
