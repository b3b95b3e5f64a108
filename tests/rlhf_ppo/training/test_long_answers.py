"""What recipes for long answers need: early credit, dis, positive examples, epochs of the critic alone, freezing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rlhf_ppo import RLHFConfig
from rlhf_ppo.config.arguments.commands import ReplayArgs
from rlhf_ppo.models.frozen_critic import freeze_critic
from rlhf_ppo.pipeline.replay import replay
from rlhf_ppo.training import run as runs
from rlhf_ppo.training import update as updates
from rlhf_ppo.training.advantages import estimate_advantages
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards

ALONE = {
    "num_epochs": 1,
    "num_minibatches": 2,
    "critic_epochs": 3,
    "critic_minibatches": 4,
    "value_learning_rate": 0.02,
}
STEPS = 1 * 2 + 2 * 4  # of a rollout under ALONE


def experience(trainer, rollout):
    rewards = shape_rewards(rollout, trainer.args, trainer.kl_coef)
    return estimate(rollout, rewards, trainer.args)


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("score", [0.0, 1.0])
@pytest.mark.parametrize("values", ["learned", "cold"])
def test_who_is_credited_for_a_score_that_the_first_of_256_tokens_decides(values, score):
    # In closed form. Before the first token half is expected; a critic that has learned expects the score right after
    # it, a cold one half to the end. All deltas but one are 0: that of the first token, or that of the last.
    args = RLHFConfig(output_dir="x", gae_lambda=0.95, gae_lambda_value=1.0)
    expected, mask = torch.full((1, 256), 0.5), torch.ones(1, 256, dtype=torch.bool)
    rewards = torch.zeros(1, 256)
    rewards[0, -1] = score
    if values == "learned":
        expected[0, 1:] = score
    advantages, targets = estimate_advantages(rewards, expected, mask, args)
    surprise, ago = score - 0.5, torch.arange(255, -1, -1)
    credit = surprise * (ago == 255) if values == "learned" else surprise * 0.95**ago
    assert_close(advantages[0], credit, rtol=1e-4, atol=1e-9)
    assert (abs(advantages[0, 0]) < 2e-6) == (values == "cold")
    assert_close(targets, torch.full((1, 256), score))  # for the critic the score does not fade on its way


def test_dis_compares_with_what_the_sampler_recorded(make_trainer, prompts):
    trainer = make_trainer(objective="dis", clip_range=0.3, clip_range_high=5.0, recompute_logprobs=True)
    rollout = trainer.rollout(prompts)
    # A sampler that gave its tokens e times the trainer's probability: every ratio is below 1 - .3.
    rollout = dataclasses.replace(rollout, sampled_logprobs=rollout.logprobs + rollout.mask)
    metrics = trainer.step(rollout)
    assert metrics["policy/clip_fraction"] == 1.0 and metrics["policy/loss"] == 0.0
    assert metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-4  # that of the trainer to itself
    assert metrics["policy/ratio_mean"] == pytest.approx(math.exp(-1), rel=0.2)
    trainer = make_trainer(objective="dis", clip_range=0.3)
    rollout = trainer.rollout(prompts)
    assert experience(trainer, rollout).experience.sampled_logprobs is None
    assert 0 < trainer.step(rollout)["policy/ratio_mean"] < 2


def test_positive_examples_are_those_above_the_bound(make_trainer, prompts):
    trainer = make_trainer(positive_loss_coef=0.5, positive_score_above=0.4, num_epochs=1, num_minibatches=1)
    rollout = trainer.rollout(prompts)
    scored = rollout.scored.clone()
    scored[0] = False  # without a score it is no example, whatever is in its place
    rollout = dataclasses.replace(rollout, scored=scored, scores=torch.where(scored, rollout.scores, 9.0))
    estimates = experience(trainer, rollout)
    good = (rollout.scores > 0.4) & scored
    assert torch.equal(estimates.experience.positive, rollout.mask & good[:, None])
    assert estimates.metrics["score/positive_fraction"] == pytest.approx(float(good.sum() / scored.sum()))
    metrics = trainer.step(rollout)
    examples = rollout.mask & good[:, None]
    assert metrics["policy/positive_loss"] == pytest.approx(-float(rollout.logprobs[examples].mean()), rel=1e-4)
    trainer.run.log(metrics)


def test_positive_examples_become_more_likely_without_any_advantage(make_trainer, prompts):
    settings = {
        "kl_coef": 0.0,
        "learning_rate": 1e-2,
        "normalize_advantages": False,
        "advantage_estimator": "reinforce",
    }
    trainer = make_trainer(
        reward_funcs=lambda prompts, completions: [1.0, -1.0] * 4, **settings, positive_loss_coef=1.0
    )
    rollout = trainer.rollout(prompts)
    estimates = experience(trainer, rollout)
    still = estimates._replace(
        experience=dataclasses.replace(estimates.experience, advantages=torch.zeros_like(rollout.logprobs))
    )
    updates.update(trainer.state, trainer.fixed, rollout, still)
    with torch.no_grad():
        after = trainer.model(*rollout.sequences(range(8)), entropy=False).logprobs
    gained = (after - rollout.logprobs)[estimates.experience.positive].mean()
    assert float(gained) > 0.05


def before_the_critic_s_turn(monkeypatch, look: Callable[[Any], Any]) -> list[Any]:
    """Call ``look(model)`` before the gradient of each step of the critic alone; returns what it returned."""
    seen, gradient = [], runs.critic_gradient

    def watched(model, *inputs, **settings):
        seen.append(look(model))
        return gradient(model, *inputs, **settings)

    monkeypatch.setattr(runs, "critic_gradient", watched)
    return seen


class TestCriticEpochs:
    def test_they_train_the_critic_and_leave_the_policy(self, make_trainer, make_model, prompts, monkeypatch):
        trainer = make_trainer(**ALONE, value_model=make_model(seed=3))
        rollout = trainer.rollout(prompts)
        seen = before_the_critic_s_turn(monkeypatch, lambda model: [weights(model.policy), weights(model.value_trunk)])
        metrics = trainer.step(rollout)
        policy, critic = seen[0]
        assert equal(policy, weights(trainer.model.policy)) and not equal(critic, weights(trainer.model.value_trunk))
        assert metrics["progress/optimizer_steps"] == STEPS
        assert metrics["optim/epochs"] == 1
        assert all(p.requires_grad for p in trainer.model.trainable_parameters())

    def test_a_shared_trunk_stays_frozen(self, make_trainer, prompts, monkeypatch):
        trainer = make_trainer(**ALONE)
        rollout = trainer.rollout(prompts)
        seen = before_the_critic_s_turn(monkeypatch, lambda model: [weights(model.policy), weights(model.value_head)])
        trainer.step(rollout)
        policy, head = seen[0]
        assert equal(policy, weights(trainer.model.policy)) and not equal(head, weights(trainer.model.value_head))

    def test_the_gradient_is_that_of_the_whole_loss_s_value_part(self, make_trainer, make_model, prompts):
        trainer = make_trainer(value_model=make_model(seed=3), vf_coef=0.7)
        rollout = trainer.rollout(prompts)
        facts, rows = experience(trainer, rollout).experience, list(range(8))
        run, model = trainer.fixed, trainer.model
        _, losses = run.minibatch_gradient(model, rollout, facts, rows, trainer.args)
        whole = [p.grad.clone() for p in model.critic_parameters() if p.grad is not None]
        model.zero_grad()
        alone = run.critic_gradient(model, rollout, facts, rows, trainer.args)
        assert_close(alone["value"], losses["value"])
        assert all(p.grad is None for p in model.policy_parameters())
        for x, y in zip(whole, [p.grad for p in model.critic_parameters() if p.grad is not None], strict=True):
            assert_close(x, y)

    def test_schedule_and_warm_up_count_them(self, make_trainer, prompts):
        trainer = make_trainer(**ALONE, total_episodes=32, critic_warmup_rollouts=1, learning_rate=0.01)
        assert trainer.args.num_optimizer_steps == 4 * STEPS
        policy, critic = trainer.state.scheduler.lr_lambdas
        # The policy's rate starts to fall when the warm-up rollout, its critic's epochs included, is over.
        assert policy(STEPS) == 1.0 and policy(STEPS + 1) == pytest.approx(1 - 1 / (3 * STEPS))
        assert critic(STEPS) == pytest.approx(0.75)
        before = weights(trainer.model.policy)
        trainer.step(trainer.rollout(prompts))
        assert equal(before, weights(trainer.model.policy))
        for _ in range(3):
            trainer.step(trainer.rollout(prompts))
        assert not equal(before, weights(trainer.model.policy))
        assert trainer.state.optimizer_steps == 4 * STEPS and trainer.state.scheduler.get_last_lr()[0] == 0

    def test_a_stop_by_the_kl_ends_the_policy_s_epochs_alone(self, make_trainer, prompts):
        trainer = make_trainer(**(ALONE | {"num_epochs": 2}), target_kl=1e-9, learning_rate=0.05)
        metrics = trainer.step(trainer.rollout(prompts))
        assert metrics["progress/optimizer_steps"] < 4 + 4 and metrics["progress/optimizer_steps"] > 4
        assert metrics["policy/approx_kl"] > 1e-9  # the minibatch that ended them is counted

    def test_they_end_when_the_run_gives_up(self, make_trainer, make_model, prompts, monkeypatch):
        trainer = make_trainer(**ALONE, value_model=make_model(seed=3), on_nonfinite="stop")
        rollout = trainer.rollout(prompts)
        before_the_critic_s_turn(monkeypatch, lambda model: model.value_trunk.ln_f.weight.data.fill_(math.nan))
        result = updates.update(trainer.state, trainer.fixed, rollout, experience(trainer, rollout))
        assert result.metrics["progress/optimizer_steps"] == 3 and result.metrics["optim/skipped_steps"] == 1

    def test_a_non_finite_step_replays(self, make_trainer, make_model, prompts, monkeypatch):
        trainer = make_trainer(**ALONE, value_model=make_model(seed=3))
        rollout = trainer.rollout(prompts)

        def broken(model):
            with torch.no_grad():
                model.value_trunk.ln_f.weight[0] = math.nan

        before_the_critic_s_turn(monkeypatch, broken)
        updates.update(trainer.state, trainer.fixed, rollout, experience(trainer, rollout))
        (folder,) = trainer.run.path.glob("blackbox-*")
        result = replay(ReplayArgs(folder=str(folder)))
        assert result.box.step == 3 and result.box.critic_alone
        assert set(result.numbers) == {"value", "grad_norm"} and result.same and not result.finite


class TestFrozenCritic:
    @pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "opt", "bloom", "gemma2"])
    def test_attention_is_found_in_every_architecture(self, make_model, kind):
        trunk = make_model(kind).base_model
        freeze_critic(trunk, "attention")
        frozen = {name for name, p in trunk.named_parameters() if not p.requires_grad}
        assert frozen and all("att" in name for name in frozen)
        words = ("mlp", "fc1", "embed", "wte", "dense_h_to_4h", "layernorm.weight", "ln_1", "layer_norm.weight")
        assert any(p.requires_grad and any(w in n for w in words) for n, p in trunk.named_parameters())
        assert sum(p.ndim == 2 and not p.requires_grad for p in trunk.parameters()) >= 2 * 2  # two layers

    @pytest.mark.parametrize("parts", ["attention", "trunk"])
    def test_what_is_frozen_stays_and_the_rest_learns(self, make_trainer, make_model, prompts, parts):
        trainer = make_trainer(value_model=make_model(seed=3), critic_frozen=parts, value_learning_rate=0.02)
        before = {n: p.clone() for n, p in trainer.model.named_parameters() if n.startswith("value_")}
        trainer.step(trainer.rollout(prompts))
        after = dict(trainer.model.named_parameters())
        moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
        assert "value_head.weight" in moved and not any("attn" in name for name in moved)
        assert (len(moved) > 4) == (parts == "attention")

    def test_a_checkpoint_holds_the_frozen_parts(self, make_trainer, make_model, prompts):
        settings = {"critic_frozen": "attention", "save_every": 1, "total_episodes": 32, "value_learning_rate": 0.02}
        whole = make_trainer(value_model=make_model(seed=3), **settings)
        whole.train()
        parted = make_trainer(value_model=make_model(seed=3), **settings)
        parted.load_checkpoint(whole.run.path / "checkpoint-2")
        # Another value_model under the same name: what the run had counts.
        other = make_trainer(value_model=make_model(seed=4), **settings)
        other.load_checkpoint(whole.run.path / "checkpoint-2")
        assert equal(weights(parted.model), weights(other.model))

    def test_a_black_box_holds_them(self, make_trainer, make_model, prompts):
        trainer = make_trainer(value_model=make_model(seed=3), critic_frozen="attention", num_minibatches=1)
        rollout = trainer.rollout(prompts)
        estimates = experience(trainer, rollout)
        broken = dataclasses.replace(estimates.experience, returns=estimates.experience.returns * math.inf)
        updates.update(trainer.state, trainer.fixed, rollout, estimates._replace(experience=broken))
        (folder,) = trainer.run.path.glob("blackbox-*")
        assert replay(ReplayArgs(folder=str(folder))).same

    def test_refusals(self, make_trainer, make_model):
        with pytest.raises(ValueError, match="critic_frozen='attention' is about a critic with a trunk of its own"):
            make_trainer(critic_frozen="attention")
        with pytest.raises(ValueError, match=r"critic_frozen='attention', but the value_model \(Linear\) has no layer"):
            freeze_critic(torch.nn.Linear(2, 2), "attention")


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_run_resumes_exactly(make_trainer, make_model, prompts, critic):
    def trainer(folder=None):
        more = {} if folder is None else {"output_dir": str(folder)}
        model = {"value_model": make_model(seed=3), "critic_frozen": "attention"} if critic == "separate" else {}
        return make_trainer(
            **(ALONE | {"critic_epochs": 2}),
            **model,
            **more,
            total_episodes=24,
            save_every=1,
            critic_warmup_rollouts=1,
            objective="dis",
            positive_loss_coef=0.1,
            positive_score_above=0.3,
        )

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=whole.run.path / "checkpoint-2")
    assert equal(weights(whole.model), weights(resumed.model))
    last = [json.loads((t.run.path / "metrics.jsonl").read_text().splitlines()[-1]) for t in (whole, resumed)]
    assert last[0] == last[1]
    assert last[0]["progress/optimizer_steps"] == 3 * (2 + 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"critic_epochs": 1, "num_epochs": 2}, ("critic_epochs=1", "num_epochs=2")),
        ({"critic_epochs": 2, "num_epochs": 2, "critic_minibatches": 2}, ("critic_minibatches=2", "critic_epochs=2")),
        ({"critic_epochs": 3, "critic_minibatches": 9}, ("critic_minibatches=9", "rollout_batch_size=8")),
        ({"critic_epochs": 3, "vf_coef": 0.0}, ("critic_epochs=3", "vf_coef=0")),
        ({"critic_epochs": 3, "objective": "reinforce"}, ("critic_epochs=3", "objective='reinforce'")),
        ({"positive_score_above": 0.5}, ("positive_score_above=0.5", "positive_loss_coef=0")),
        (
            {"objective": "dis", "recompute_logprobs": True, "importance_weight_cap": 2.0},
            ("importance_weight_cap=2.0", "objective='dis'"),
        ),
    ],
)
def test_contradictions_name_both_sides(make_trainer, settings, words):
    with pytest.raises(ValueError) as refusal:
        make_trainer(**settings)
    assert all(word in str(refusal.value) for word in words), refusal.value
