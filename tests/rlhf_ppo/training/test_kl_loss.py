"""KL to the reference as a loss term in the update: exact against a plain computation, k2, splits, and learning."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ppo.core import PPOConfig, ppo_loss
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards

EXACT = {"kl_loss_coef": 0.5, "kl_loss": "exact"}


def plain_kl(trainer, rollout, reference, temperature: float) -> torch.Tensor:
    """[B, T] KL over the whole vocabulary from unpadded rows, one at a time, in float64."""
    kl = torch.zeros(rollout.mask.shape, dtype=torch.float64)
    for row in range(len(rollout.prompts)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row][rollout.mask[row]]
        ids = torch.cat([prompt, response])[None]
        logits = [model(ids).logits[0, len(prompt) - 1 : -1].double() for model in (trainer.model.policy, reference)]
        for t in range(min(trainer.args.min_new_tokens, len(response))):
            for x in logits:
                x[t, list(trainer.stop_token_ids)] = -1e4  # as good as banned
        log_p, log_q = ((x / temperature).log_softmax(-1) for x in logits)
        kl[row, : len(response)] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl


def read(trainer, rollout):
    part = rollout.sequences(range(len(rollout.prompts)))
    temperature = trainer.args.temperature
    return trainer.model(*part, temperature=temperature, reference=trainer.reference.outputs(part))


# gpt2 and llama: a plain output layer; gemma2 caps its logits, so its KL comes from whole logits.
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("ref_kind", ["same", "gpt2"])
def test_exact_kl_equals_a_plain_computation(make_trainer, make_model, prompts, kind, ref_kind):
    reference = make_model(kind if ref_kind == "same" else ref_kind, seed=7)
    trainer = make_trainer(model=make_model(kind), ref_model=reference, temperature=0.8, **EXACT)
    rollout = trainer.rollout(prompts)
    new = read(trainer, rollout)
    with torch.no_grad():
        expected = plain_kl(trainer, rollout, trainer.reference.model, 0.8)
    # Float32 against float64.
    torch.testing.assert_close(new.kl.double(), expected, atol=1e-4, rtol=1e-4)
    assert (new.kl[~rollout.mask] == 0).all() and (new.kl[rollout.mask] > 0).all()


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_banned_stop_tokens_have_no_part_in_it(make_trainer, make_model, prompts, kind):
    trainer = make_trainer(model=make_model(kind), ref_model=make_model(kind, seed=7), min_new_tokens=3, **EXACT)
    rollout = trainer.rollout(prompts)
    assert rollout.lengths.min() >= 3 and rollout.lengths.max() > 3
    new = read(trainer, rollout)
    with torch.no_grad():
        expected = plain_kl(trainer, rollout, trainer.reference.model, 1.0)
    torch.testing.assert_close(new.kl.double(), expected, atol=1e-4, rtol=1e-4)
    new.kl.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trainer.model.policy.parameters() if p.grad is not None)


def test_its_gradient_reaches_the_policy_as_in_the_plain_computation(make_trainer, make_model, prompts):
    trainer = make_trainer(ref_model=make_model(seed=7), **EXACT)
    rollout = trainer.rollout(prompts)
    found = []
    for kl in (read(trainer, rollout).kl, plain_kl(trainer, rollout, trainer.reference.model, 1.0)):
        trainer.model.zero_grad()
        kl.sum().backward()
        found.append({n: p.grad.clone() for n, p in trainer.model.policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-4, rtol=1e-3)  # float32 sums over the rollout
    assert all(p.grad is None for p in trainer.reference.model.parameters())


def test_with_the_adapter_off_as_reference(make_trainer, make_model, prompts):
    from peft import LoraConfig

    trainer = make_trainer(peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"), **EXACT)
    with torch.no_grad():
        for name, p in trainer.model.policy.named_parameters():
            p.add_(torch.randn_like(p) if "lora_B" in name else 0.0)  # as after some training
    assert trainer.reference.model is None
    rollout = trainer.rollout(prompts)
    with torch.no_grad():
        expected = plain_kl(trainer, rollout, make_model().eval(), 1.0)  # the same seed: the base before the adapter
        torch.testing.assert_close(read(trainer, rollout).kl.double(), expected, atol=1e-4, rtol=1e-4)
    assert (expected[rollout.mask] > 0).all()
    metrics = trainer.step(rollout)
    assert math.isfinite(metrics["kl/loss"]) and metrics["kl/loss"] > 0


@pytest.mark.parametrize("kl_loss", ["k2", "exact"])
@pytest.mark.parametrize("microbatch", [1, 7])
def test_the_gradient_is_the_same_however_the_minibatch_is_split(
    make_trainer, make_model, prompts, kl_loss, microbatch
):
    found = []
    for size in (None, microbatch):
        trainer = make_trainer(microbatch_tokens=size, ref_model=make_model(seed=7), kl_loss_coef=0.5, kl_loss=kl_loss)
        rollout = trainer.rollout(prompts)
        old = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
        _, losses = trainer.fixed.minibatch_gradient(trainer.model, rollout, old, list(range(8)), trainer.args)
        found.append([losses["kl"], *(p.grad.clone() for p in trainer.model.parameters() if p.grad is not None)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)  # float32 sums in another order


def test_the_reference_as_policy_has_no_kl_and_reading_it_costs_nothing_unless_asked(make_trainer, prompts):
    trainer = make_trainer(**EXACT, learning_rate=0.0)
    metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["kl/loss"] == pytest.approx(0, abs=1e-6)
    plain = make_trainer()
    plain.reference.outputs = None  # would raise if called
    assert "kl/loss" not in plain.step(plain.rollout(prompts))


@pytest.mark.parametrize("kl_loss", ["k2", "exact"])
def test_it_pulls_the_policy_to_the_reference(make_trainer, make_model, kl_loss):
    """No reward signal, no cost in the rewards: the KL loss alone brings the two together."""
    trainer = make_trainer(
        ref_model=make_model(seed=7),
        reward_funcs=lambda p, c, **_: [float(i % 2) for i in range(len(c))],
        total_episodes=16 * 10,
        rollout_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        kl_coef=0.0,
        kl_loss_coef=1.0,
        kl_loss=kl_loss,
        normalize_advantages=False,
        vf_coef=0.0,
    )
    found = []
    trainer.callbacks.append(lambda _, metrics: found.append(metrics["kl/reference_nats_per_response"]))
    trainer.train()
    assert found[-1] < 0.6 * found[0], found


def test_cost_in_the_rewards_and_loss_term_may_both_be_on(make_trainer, prompts):
    trainer = make_trainer(kl_coef=0.1, kl_loss_coef=0.1)
    metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["kl/coef"] == 0.1 and "kl/loss" in metrics
    trainer.run.log(metrics)


def test_a_critic_warms_up_without_it(make_trainer, prompts):
    """The policy stays, so no KL is measured; after the warm-up it is."""
    trainer = make_trainer(**EXACT, gae_lambda_value=0.5, critic_warmup_rollouts=1, total_episodes=32)
    assert "kl/loss" not in trainer.step(trainer.rollout(prompts))
    assert "kl/loss" in trainer.step(trainer.rollout(prompts))


def test_ratio_levels_train(make_trainer, prompts):
    """With one turn a response, turn and sequence level are one; both differ from the token level."""
    losses = {}
    for level in ("token", "turn", "sequence"):
        trainer = make_trainer(ratio_level=level, num_epochs=3, num_minibatches=1, learning_rate=1e-2)
        rollout = trainer.rollout(prompts)
        trainer.step(rollout)
        old = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
        new = trainer.model(*rollout.sequences(range(8)))
        losses[level] = ppo_loss(new, old, trainer.args).policy.item()
    assert isinstance(trainer.args, PPOConfig)
    assert losses["turn"] == losses["sequence"] != losses["token"]
