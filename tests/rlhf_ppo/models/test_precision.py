"""Precision: who computes in bfloat16, and what a run in it keeps."""

from __future__ import annotations

import pytest
import torch

from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.runtime.machine.device import compute_in_bf16

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "able"),
    [
        ({}, False),
        ({"avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": 1}, True),
    ],
)
def test_auto_on_a_cpu_asks_its_instructions(monkeypatch, capabilities, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert compute_in_bf16("auto", CPU) is able
    assert compute_in_bf16("bf16", CPU) and not compute_in_bf16("fp32", CPU)
    assert not compute_in_bf16("auto", torch.device("mps"))


@pytest.mark.parametrize("able", [False, True])
def test_auto_on_a_gpu_asks_for_bf16_that_is_not_emulated(monkeypatch, able):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or able)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old one")
    assert compute_in_bf16("auto", GPU) is able
    assert not compute_in_bf16("fp32", GPU)
    if able:
        assert compute_in_bf16("bf16", GPU)
    else:
        with pytest.raises(ValueError, match="precision='bf16' needs a newer GPU than an old one"):
            compute_in_bf16("bf16", GPU)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("separate", [False, True])
def test_a_run_in_bf16_is_near_one_in_fp32(make_trainer, make_model, wake_critic, prompts, kind, separate):
    """The same rollout, read in both: only the products differ, by their 8 bits."""
    grads, losses, trainers = [], [], []
    for precision in ("bf16", "fp32"):
        trainer = make_trainer(
            model=make_model(kind),
            value_model=make_model(kind, seed=7) if separate else None,
            precision=precision,
            max_grad_norm=1e9,
            num_epochs=1,
            num_minibatches=1,
        )
        wake_critic(trainer.model)
        trainers.append(trainer)
    rollout = trainers[1].rollout(prompts)
    for trainer in trainers:
        trainer.model.zero_grad()
        taken: list[torch.Tensor] = []
        trainer.optimizer.register_step_pre_hook(
            lambda optimizer, *_, taken=taken: taken.extend(
                p.grad.flatten().clone() for group in optimizer.param_groups for p in group["params"]
            )
        )
        metrics = trainer.step(rollout)
        grads.append(torch.cat(taken))
        losses.append(metrics["value/loss"])
        assert metrics["optim/skipped_steps"] == 0
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        assert all(x.dtype == torch.float32 for facts in trainer.optimizer.state.values() for x in facts.values())
    assert grads[0].dtype == torch.float32
    assert not torch.equal(*grads)
    # bfloat16 has 8 bits, so each product is off by up to 0.4%; two layers of wide weights make a few percent of it.
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert torch.cosine_similarity(*grads, dim=0) > 0.98
    assert float(grads[0].norm()) == pytest.approx(float(grads[1].norm()), rel=0.1)


def test_a_run_in_bf16_goes_through_and_samples_what_it_trains(make_trainer):
    """Cached decoding and one pass over the whole are rounded differently: tenths of a nat on log-probs of -20."""
    trainer = make_trainer(precision="bf16", recompute_logprobs=False)
    metrics = trainer.train()
    assert trainer.fixed.bf16
    assert 0 < metrics["policy/first_minibatch_max_abs_log_ratio"] < 0.5
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_a_rollout_in_bf16_decodes_with_the_weights_of_now(make_trainer, prompts):
    """Weights are rounded once an optimizer step: the next rollout must see what else changed them."""
    trainer = make_trainer(precision="bf16")
    trainer.rollout(prompts)
    layer = trainer.model.policy.get_output_embeddings()
    layer.weight.data.add_(torch.randn_like(layer.weight))  # as callbacks do, which no version counter sees
    rollout = trainer.rollout(prompts)
    with torch.no_grad(), computing(trainer.model, bf16=True):
        read = trainer.model(*rollout.sequences(range(len(prompts)))).logprobs
    # Decoding and a full pass round differently, by hundredths of a nat; other weights move log-probs by whole nats.
    assert (read - rollout.logprobs)[rollout.mask].abs().max() < 0.2
