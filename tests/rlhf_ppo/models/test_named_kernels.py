"""Attention and kernels by name: every model uses them, and what cannot work is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from rlhf_ppo.models.acceleration import named_kernels
from rlhf_ppo.models.acceleration.named_kernels import check_kernels, set_kernels
from rlhf_ppo.rewards.reward_model import RewardModel


@pytest.fixture
def no_weights(monkeypatch):
    """Fail if a model's weights are loaded."""
    monkeypatch.setattr("rlhf_ppo.training.setup.load_models", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr("rlhf_ppo.training.setup.load_rewards", lambda *_, **__: pytest.fail("a reward was loaded"))


@pytest.mark.parametrize("adapter", [False, True])
def test_eager_attention_computes_what_sdpa_does(
    make_trainer, make_model, make_classifier, tokenizer, adapter, tmp_path
):

    make_model("llama").save_pretrained(tmp_path / "policy")
    settings: dict[str, Any] = {"model": str(tmp_path / "policy"), "total_episodes": 8}
    if adapter:
        settings["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    runs = []
    for attention in (None, "eager"):
        judge = RewardModel(make_classifier("llama"), tokenizer)
        trainer = make_trainer(
            **settings, attn_implementation=attention, value_model=make_model("gpt2", seed=7), reward_funcs=judge
        )
        trainer.train()
        runs.append(json.loads((trainer.run.path / "metrics.jsonl").read_text().splitlines()[0]))
        model, reference = trainer.model, trainer.fixed.reference
        packs = model.runner.packs, model.value_runner.packs, reference.model is None or reference.runner.packs
        assert all(packs) if attention is None else not any((*packs[:2], reference.runner.packs))
        used = [
            m.config._attn_implementation for m in (model.runner.model, model.value_trunk, reference.root, judge.model)
        ]
        assert used == [attention or "sdpa"] * 4
    sdpa, eager = runs
    for name in ("policy/loss", "value/loss", "kl/reference_nats_per_response", "policy/entropy"):
        assert eager[name] == pytest.approx(sdpa[name], rel=1e-4, abs=1e-6), name
    assert max(row["policy/first_minibatch_max_abs_log_ratio"] for row in runs) < 1e-5


def test_packing_stays_where_its_attention_is_named(make_trainer):
    assert make_trainer(attn_implementation="sdpa").model.runner.packs


@pytest.mark.parametrize("role", ["model", "ref_model", "value_model", "reward"])
def test_attention_that_a_model_lacks_is_refused(make_trainer, make_model, make_classifier, role, tmp_path, no_weights):
    """Bloom has no sdpa attention."""
    folder = str(tmp_path / "it")
    (make_classifier if role == "reward" else make_model)("bloom").save_pretrained(folder)
    given = {"reward_funcs": folder} if role == "reward" else {role: folder}
    with pytest.raises(ValueError, match=rf"attn_implementation='sdpa' does not work for {role}.*: leave it out"):
        make_trainer(**given, attn_implementation="sdpa")


def test_the_users_model_keeps_its_attention_where_it_is_refused(make_trainer, make_model):
    model = make_model()
    with pytest.raises(ValueError, match="attn_implementation='swift' does not work for model"):
        make_trainer(model=model, attn_implementation="swift")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("device", "bf16"), [("cpu", True), ("cuda", False)])
def test_flash_attention_needs_bfloat16_on_a_gpu(make_trainer, device, bf16):
    args = dataclasses.replace(make_trainer().args, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=r"flash_attention_2'.*bfloat16 on a CUDA GPU.*(cpu|fp32)"):
        check_kernels(args, torch.device(device), bf16=bf16)


def test_a_missing_package_is_named_with_its_install_line(make_trainer, no_weights, monkeypatch):
    monkeypatch.setattr(named_kernels, "is_kernels_available", lambda: False)
    with pytest.raises(ModuleNotFoundError, match=r"use_kernels=True .* pip install kernels"):
        make_trainer(use_kernels=True)


def test_kernels_have_a_backward_pass_where_a_model_is_trained(make_trainer, make_model, make_classifier, monkeypatch):
    """transformers takes those of a model in training mode, and the run's models are never in it."""
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(named_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(
        PreTrainedModel, "set_use_kernels", lambda self, use: asked.append((type(self).__name__, self.training))
    )
    trainer = make_trainer(use_kernels=True, value_model=make_model("llama"))
    assert asked == [("GPT2LMHeadModel", True), ("LlamaModel", True), ("GPT2LMHeadModel", False)]
    assert not trainer.model.policy.training and not trainer.model.value_trunk.training


def test_attention_that_a_class_computes_itself_is_refused(make_model, make_trainer, monkeypatch):
    args, model = make_trainer(attn_implementation="eager").args, make_model()
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(ValueError, match="GPT2LMHeadModel computes attention itself: leave it out"):
        set_kernels(model, args)
