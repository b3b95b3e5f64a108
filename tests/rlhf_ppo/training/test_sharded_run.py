"""Sharded runs: what a run on one process learns, is what processes learn that share its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from float64_runs import loaded_weights, require_equal, train
from processes import in_processes
from safetensors.torch import load_file

from rlhf_ppo.runtime.checkpoint import verify_checkpoint

SHARDED = {"sharding": "full", "save_every": 2}


@pytest.fixture
def saved(tmp_path: Path, tokenizer, make_model):
    """``saved(kind)``: a folder with a tiny model in ``model/``."""

    def save(kind: str) -> str:
        make_model(kind).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path)

    return save


@pytest.mark.parametrize(("kind", "decoding"), [("gpt2", "whole"), ("llama", "layers")])
def test_two_processes_that_share_the_weights_train_as_one(saved, kind, decoding):
    folder = saved(kind)
    alone = train(folder, {})
    settings: dict[str, Any] = {**SHARDED, "sharded_decoding": decoding, "output_dir": f"{folder}/sharded"}
    for one in in_processes(2, train, folder, settings):
        require_equal(alone, one, 1e-9)


CRITICS = [
    ({}, {"critic": "separate"}),
    ({"critic": "adapter"}, {"lora_rank": 3}),
    ({"kl_loss_coef": 0.1, "kl_loss": "exact", "critic_epochs": 3, "critic_warmup_rollouts": 1}, {}),
]


@pytest.mark.parametrize(("settings", "given"), CRITICS)
def test_critics_of_every_kind_and_adapters_learn_the_same_under_sharding(saved, settings, given):
    folder = saved("llama")
    alone = train(folder, settings, given)
    sharded = {**SHARDED, **settings, "output_dir": f"{folder}/sharded"}
    require_equal(alone, in_processes(2, train, folder, sharded, given)[1])


def test_a_checkpoint_goes_from_two_processes_to_one_and_back(saved):
    folder = saved("gpt2")
    alone = train(folder, {"save_every": 1})
    first, second, third = ({"save_every": 1, "output_dir": f"{folder}/run{n}"} for n in range(3))
    in_processes(2, train, folder, {**first, "sharding": "full"}, None, None, 1)
    assert [f.name for f in Path(folder, "run0", "checkpoint-1").glob("*.1.safetensors")] != []
    train(folder, second, None, f"{folder}/run0", 2)
    for found in in_processes(2, train, folder, {**third, "sharding": "full"}, None, f"{folder}/run1", None):
        require_equal({**alone, "metrics": alone["metrics"][2:]}, found)
    for name in ("model.safetensors", "value_head.safetensors"):
        one, other = (load_file(Path(folder, run, name)) for run in ("run", "run2"))
        for key, x in one.items():
            torch.testing.assert_close(x, other[key], rtol=1e-9, atol=1e-9)
    assert verify_checkpoint(Path(folder, "run2", "checkpoint-3")) == []


@pytest.mark.parametrize(
    ("kind", "given", "file_size"),
    [("gpt2", {"critic": "separate"}, "1GB"), ("gemma2", {}, "5KB"), ("llama", {"lora_rank": 3}, "1GB")],
)
def test_each_process_reads_its_rows_alone(tmp_path, tokenizer, make_model, kind, given, file_size):
    make_model(kind).bfloat16().save_pretrained(tmp_path / "model", max_shard_size=file_size)
    tokenizer.save_pretrained(tmp_path / "model")
    alone = loaded_weights(str(tmp_path), {}, given, False)
    for found in in_processes(2, loaded_weights, str(tmp_path), {"sharding": "full"}, given, True):
        assert found.keys() == alone.keys()
        for name, weight in alone.items():
            assert (found[name] == weight).all() if hasattr(weight, "all") else found[name] == weight, name
