"""Adapters: they alone are trained, the reference is the model without them, and they save both ways."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf_ppo.models.forward.runner import Sequences


def lora(**settings) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM", **settings}
    )


IDS = torch.tensor([[3, 4, 5, 6]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_only_the_adapter_and_the_value_head_are_trained(make_trainer, make_model, prompts):
    trainer = make_trainer(peft_config=lora(), learning_rate=0.01)
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name or name.startswith("value_head") for name in trainable)
    trainer.step(trainer.rollout(prompts))
    base = trainer.model.policy.get_base_model().state_dict()
    for name, weight in make_model().state_dict().items():
        assert torch.equal(base[name.replace("c_attn.", "c_attn.base_layer.")], weight), name
    assert any((p != 0).any() for name, p in trainer.model.named_parameters() if "lora_B" in name)


def test_the_reference_is_the_adapter_switched_off(make_trainer, make_model, prompts):
    """No second copy of the weights; its log-probs are those of the model as it came, before and after training."""
    trainer = make_trainer(peft_config=lora(), learning_rate=0.05)
    assert trainer.reference.model is None
    rollout = trainer.rollout(prompts)
    inputs = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask)
    before = trainer.reference.logprobs(Sequences(*inputs), temperature=1.0)
    for _ in range(2):
        metrics = trainer.step(trainer.rollout(prompts))
    assert torch.equal(trainer.reference.logprobs(Sequences(*inputs), temperature=1.0), before)
    plain = make_trainer(model=make_model())
    torch.testing.assert_close(plain.reference.logprobs(Sequences(*inputs), temperature=1.0), before)
    # Back on after the reference was read: the policy has moved away from it.
    with torch.no_grad():
        assert not torch.allclose(trainer.model(*inputs).logprobs, before)
    assert abs(metrics["kl/reference_nats_per_response"]) > 1e-4


def test_the_adapter_is_saved_and_opens_on_its_base(make_trainer, make_model, prompts, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    trainer = make_trainer(model=str(tmp_path / "base"), peft_config=lora(), learning_rate=0.05)
    trainer.step(trainer.rollout(prompts))
    folder = trainer.save_model()
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    assert (folder / "value_head.safetensors").is_file()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    torch.testing.assert_close(
        logits(again), logits(trainer.model.policy), atol=1e-5, rtol=1e-5
    )  # a fused activation rounds elsewhere


def test_the_merged_model_is_saved_and_opens_by_itself(make_trainer, make_model, prompts, tmp_path):
    trainer = make_trainer(peft_config=lora(), learning_rate=0.05)
    trainer.step(trainer.rollout(prompts))
    folder = trainer.save_model(tmp_path / "merged", merge_adapter=True)
    assert not (folder / "adapter_model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(folder)
    # Merging adds B A to the weights first and multiplies then: the same up to float32 rounding.
    torch.testing.assert_close(logits(merged), logits(trainer.model.policy), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(make_model()))
    # The run goes on with its adapter.
    assert trainer.step(trainer.rollout(prompts))["progress/iteration"] == 2
    with pytest.raises(ValueError, match="merge_adapter=True needs an adapter"):
        make_trainer().save_model(tmp_path / "none", merge_adapter=True)


def test_a_peft_model_given_directly_has_a_frozen_copy_as_reference(make_trainer, make_model, prompts):
    """Its adapter is already trained: switched off it would be another model than the run's start."""
    start = get_peft_model(make_model(), lora(init_lora_weights=False))
    expected = logits(start)
    trainer = make_trainer(model=start, learning_rate=0.05)
    assert trainer.reference.model is not None
    assert not any(p.requires_grad for p in trainer.reference.model.parameters())
    first = trainer.step(trainer.rollout(prompts))
    assert first["kl/reference_nats_per_response"] == pytest.approx(0, abs=1e-4)
    # One fused kernel instead of eight for the activation: the same function, rounded elsewhere.
    torch.testing.assert_close(logits(trainer.reference.model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(trainer.model.policy), expected)
    trainable = [name for name, p in trainer.model.policy.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_two_adapters_and_an_untrainable_one_are_refused(make_trainer, make_model, tmp_path):
    with pytest.raises(ValueError, match="model already has an adapter and peft_config asks for another"):
        make_trainer(model=get_peft_model(make_model(), lora()), peft_config=lora())
    get_peft_model(make_model(), lora()).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(make_model(), tmp_path)
    with pytest.raises(ValueError, match="is_trainable=True"):
        make_trainer(model=frozen)
    make_trainer(model=PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True))


def test_a_separate_critic_beside_an_adapter_is_a_plain_trunk(make_trainer, make_model, prompts):
    """Also when it is the very object that gets the adapter: the critic has no adapter and all of it learns."""
    model = make_model()
    trainer = make_trainer(model=model, value_model=model, peft_config=lora())
    names = [name for name, _ in trainer.model.value_trunk.named_parameters()]
    assert not any("lora" in name for name in names)
    assert all(p.requires_grad for p in trainer.model.value_trunk.parameters())
    assert trainer.step(trainer.rollout(prompts))["value/loss"] > 0
