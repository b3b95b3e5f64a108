"""Low precision: a reference in bfloat16 is half as large and nearly the same; what needs a GPU says so."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from rlhf_ppo.models.adapters.quantization import check_quantization, quantization_config

GPU = torch.device("cuda")


@pytest.fixture
def folder(make_model, tmp_path) -> str:
    make_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def matrices(model) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.ndim > 1]


def test_a_reference_in_bfloat16_is_nearly_the_same(make_trainer, make_model, prompts):
    for kind in ("gpt2", "llama"):
        model = make_model(kind)
        full, half = make_trainer(model=model), make_trainer(model=model, reference_dtype="bfloat16")
        assert {p.dtype for p in matrices(half.reference.model)} == {torch.bfloat16}
        assert {p.dtype for p in full.reference.model.parameters()} == {torch.float32}
        # The policy, and the model that was given, stay as they were.
        assert {p.dtype for p in half.model.parameters()} == {p.dtype for p in model.parameters()} == {torch.float32}
        # Rotary frequencies are buffers; rounded, they would turn far positions elsewhere.
        assert all(b.dtype != torch.bfloat16 for b in half.reference.model.buffers())
        rollout = full.rollout(prompts)
        again = half.reference.logprobs(rollout.sequences(list(range(8))), temperature=1.0)
        gaps = (again - rollout.ref_logprobs).abs()[rollout.mask]
        # bfloat16 keeps 8 bits: weights of size 1 and logits of a few nats are off by hundredths, rarely by more.
        assert 0 < gaps.mean() < 0.03 and gaps.max() < 0.3
        metrics = half.step(half.rollout(prompts))
        assert abs(metrics["kl/reference_nats_per_response"]) < 0.2


def test_a_reference_from_a_folder_in_bfloat16(make_trainer, folder, prompts):
    trainer = make_trainer(model=folder, ref_model=folder, reference_dtype="bfloat16")
    assert {p.dtype for p in matrices(trainer.reference.model)} == {torch.bfloat16}
    trainer.step(trainer.rollout(prompts))


@pytest.mark.parametrize("dtype", ["bfloat16", "8bit", "4bit"])
def test_an_adapter_switched_off_has_no_weights_to_round(make_trainer, dtype):
    with pytest.raises(ValueError, match=f"reference_dtype='{dtype}' .* with peft_config the reference is the policy"):
        make_trainer(reference_dtype=dtype, peft_config=LoraConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_bitsandbytes_needs_a_gpu(make_trainer, folder, bits):
    lora = LoraConfig(task_type="CAUSAL_LM")
    with pytest.raises(
        ValueError, match=rf"quantization='{bits}' .*pip install bitsandbytes.*CUDA GPU.*device is 'cpu'"
    ):
        make_trainer(model=folder, quantization=bits, peft_config=lora)
    with pytest.raises(ValueError, match=f"reference_dtype='{bits}' .* needs a CUDA GPU"):
        make_trainer(model=folder, reference_dtype=bits)


def test_bitsandbytes_must_be_there_and_loads_models_itself(make_model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"quantization='4bit' .*pip install bitsandbytes"):
        check_quantization("quantization", "4bit", "folder", GPU)
    with pytest.raises(ValueError, match="a model object is loaded already: give its folder or hub id"):
        check_quantization("quantization", "4bit", make_model(), GPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_quantization("quantization", "4bit", "folder", GPU)


def test_a_quantised_policy_needs_an_adapter(make_trainer, folder):
    with pytest.raises(ValueError, match=r"quantization='4bit' freezes the policy's weights.*peft_config"):
        make_trainer(model=folder, quantization="4bit")


def test_what_is_asked_of_bitsandbytes():
    four = quantization_config("4bit", bf16=True)
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_config("4bit", bf16=False).bnb_4bit_compute_dtype == torch.float32
    eight = quantization_config("8bit", bf16=True)
    assert eight.load_in_8bit and not eight.load_in_4bit
