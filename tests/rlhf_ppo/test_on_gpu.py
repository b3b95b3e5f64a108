"""On a CUDA GPU, with its kernels, engines and precisions: what the other tests hold on a CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import moved
from peft import LoraConfig

from rlhf_ppo.generation import slots
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards

pytestmark = pytest.mark.cuda
GPU: dict[str, Any] = {"device": "cuda", "generation": "dynamic"}


def gradients(trainer: Any, rollout: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of a minibatch of all eight responses, on the CPU."""
    old = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
    trainer.fixed.minibatch_gradient(trainer.model, rollout, old, list(range(8)), trainer.args)
    return {name: p.grad.cpu() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradients_are_those_of_the_cpu(make_trainer, make_model, wake_critic, prompts, kind):
    settings = {"ent_coef": 0.1, "vf_coef": 0.5, "clip_range_vf": 0.2}
    here, there = (make_trainer(make_model(kind), **settings, **where) for where in ({}, GPU))
    for trainer in (here, there):
        wake_critic(trainer.model)
    rollout = here.rollout(prompts)
    expected, found = gradients(here, rollout), gradients(there, moved(rollout, "cuda"))
    assert expected.keys() == found.keys() and len(found) > 4
    for name, gradient in expected.items():
        # float32 sums in another order.
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["dynamic", "static"])
def test_a_run_trains(make_trainer, engine, precision):
    """The tripwire is at its default: sampling and training agree."""
    trainer = make_trainer(total_episodes=24, device="cuda", generation=engine, precision=precision)
    trainer.train()
    rows = trainer.run.read()
    assert len(rows) == 3 and all(math.isfinite(value) for row in rows for value in row.values())
    gaps = [row["policy/first_minibatch_max_abs_log_ratio"] for row in rows]
    assert max(gaps) < (1e-4 if precision == "fp32" else 0.5)
    assert sum(row["optim/skipped_steps"] for row in rows) == 0


@pytest.mark.parametrize("size", [None, 3])
def test_engines_sample_the_same(make_trainer, make_model, prompts, size):
    settings = {"device": "cuda", "min_new_tokens": 2, "max_new_tokens": 24}
    plain = make_trainer(make_model("llama"), generation="dynamic", **settings).rollout(prompts)
    assert len(plain.lengths.unique()) > 3
    for name in ("dynamic", "static"):
        trainer = make_trainer(make_model("llama"), generation=name, decode_batch_size=size, **settings)
        for _ in range(2):  # the second meets a captured graph
            trainer.state.rollouts_made = 0
            found = trainer.rollout(prompts)
            assert torch.equal(plain.response_ids, found.response_ids)
            torch.testing.assert_close(plain.logprobs, found.logprobs, rtol=1e-4, atol=1e-5)


def test_no_decode_step_of_the_static_engine_waits(make_trainer, make_model, prompts, monkeypatch):
    """Once its graph is captured, which the run's first rollouts do."""
    trainer = make_trainer(make_model("llama"), device="cuda", generation="static", decode_batch_size=3)
    for _ in range(2):
        trainer.rollout(prompts)
    advance, steps = slots._Decoding.advance, []

    def strictly(run: Any, count: int) -> None:
        steps.append(count)
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance(run, count)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(slots._Decoding, "advance", strictly)
    trainer.rollout(prompts)
    assert steps


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_a_run_trains_with_attention_of_another_name(make_trainer, attention):
    if attention.startswith("flash"):
        pytest.importorskip("flash_attn")
    trainer = make_trainer(device="cuda", attn_implementation=attention, precision="bf16")
    trainer.train()
    assert all(row["policy/first_minibatch_max_abs_log_ratio"] < 0.5 for row in trainer.run.read())


@pytest.mark.parametrize("setting", ["offload_activations", "gradient_checkpointing"])
def test_saving_memory_changes_no_gradient(make_trainer, prompts, setting):
    plain, saving = make_trainer(**GPU), make_trainer(**GPU, **{setting: True})
    rollout = plain.rollout(prompts)
    expected, found = gradients(plain, rollout), gradients(saving, rollout)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_ends_like_the_one_that_was_not_stopped(make_trainer):
    whole, part = (make_trainer(total_episodes=32, save_every=1, **GPU) for _ in range(2))
    whole.train()
    part.callbacks.append(lambda trainer, metrics: trainer.state.iteration == 2)
    part.train()
    resumed = make_trainer(total_episodes=32, save_every=1, output_dir=str(part.run.path), **GPU)
    resumed.train(resume_from_checkpoint="auto")
    last, expected = resumed.run.read()[-1], whole.run.read()[-1]
    # To the last bit only where kernels are deterministic.
    assert last == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_an_adapter_on_a_base_in_4_bits_trains(make_trainer, make_model, prompts, tmp_path):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    make_model("llama").save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, task_type="CAUSAL_LM")
    trainer = make_trainer(str(tmp_path / "base"), peft_config=lora, quantization="4bit", precision="bf16", **GPU)
    metrics = trainer.step(trainer.rollout(prompts))
    assert math.isfinite(metrics["policy/loss"]) and metrics["optim/grad_norm"] > 0
