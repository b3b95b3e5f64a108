"""Deferred weights: which models can be built without them, and that they take no memory until they are read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen3MoeConfig

from rlhf_ppo.models.adapters.lora import lora_config
from rlhf_ppo.models.loading import load_policy, load_trunk
from rlhf_ppo.models.sharded.deferred import Loader, _untouched_zeros, named_sources, read_weights_held, simple_adapter


def refuse(source: Any) -> Any:
    raise AssertionError(f"{source} is loaded whole")


def read(loader: Loader, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    read_weights_held(model, named_sources(model, loader.sources))
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "gemma2", "qwen2"])
@pytest.mark.parametrize("size", ["1GB", "4KB"])
def test_what_is_read_later_is_what_transformers_loads(tmp_path, make_model, kind, size):
    made = make_model(kind)
    made.generation_config = GenerationConfig(eos_token_id=[0, 7])
    made.bfloat16().save_pretrained(tmp_path, max_shard_size=size)
    for build, whole in ((AutoModelForCausalLM, load_policy), (AutoModel, load_trunk)):
        loader, loaded = Loader(defers=True), whole(str(tmp_path))
        model = loader.load(build, str(tmp_path), refuse)
        assert not model.training and type(model) is type(loaded) and model.name_or_path == str(tmp_path)
        assert not any(p.any() for p in model.parameters())
        expected = dict(loaded.named_parameters())
        found = read(loader, model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(x, expected[name]) and x.dtype == torch.float32 for name, x in found.items())
        ids = torch.arange(3, 11)[None]
        assert torch.equal(model(ids)[0], loaded(ids)[0])
    assert loader.load(AutoModelForCausalLM, str(tmp_path), refuse).generation_config.eos_token_id == [0, 7]


def test_models_whose_files_do_not_hold_each_weight_as_it_is_are_loaded_whole(tmp_path, make_model):
    whole = object()
    experts = Qwen3MoeConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        head_dim=8,
    )
    AutoModelForCausalLM.from_config(experts).save_pretrained(tmp_path / "experts")
    make_model("llama").save_pretrained(tmp_path / "lost")
    file = tmp_path / "lost" / "model.safetensors"
    weights = load_file(file)
    save_file({name: x for name, x in weights.items() if "norm" not in name}, file, metadata={"format": "pt"})
    for source in (make_model("gpt2"), *(str(tmp_path / name) for name in ("experts", "lost"))):
        assert Loader(defers=True).load(AutoModelForCausalLM, source, lambda _: whole) is whole
    make_model("llama").save_pretrained(tmp_path / "good")
    assert Loader(defers=False).load(AutoModelForCausalLM, str(tmp_path / "good"), lambda _: whole) is whole


def test_a_damaged_file_is_named(tmp_path, make_model):
    make_model("llama").save_pretrained(tmp_path)
    loader = Loader(defers=True)
    model = loader.load(AutoModelForCausalLM, str(tmp_path), refuse)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        read(loader, model)


def test_adapters_that_start_from_the_bases_weights_are_told_apart():
    assert simple_adapter(None) and simple_adapter(lora_config(4))
    assert simple_adapter(LoraConfig(init_lora_weights="gaussian"))
    for option in ({"init_lora_weights": "pissa"}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["x"]}):
        assert not simple_adapter(LoraConfig(**option))
    assert not simple_adapter(LoraConfig(init_lora_weights=False))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason=f"{sys.platform} has no /proc")
def test_zeros_that_nothing_writes_to_take_no_memory():
    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = held()
    zeros = _untouched_zeros(torch.Size([64, 2**20]), torch.float32)
    assert float(zeros[:, ::997].sum()) == 0 and held() - before < 2**15  # KiB, of 2**18
    assert _untouched_zeros(torch.Size([3, 2]), torch.bfloat16).shape == (3, 2)
