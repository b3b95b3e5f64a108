"""Sharded runs: what a run on one process learns, is what processes learn that share its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from float64_runs import (
    loaded_weights,
    require_equal,
    stop_while_sampling,
    train,
    train_in_bfloat16,
    train_on_machines_of_two,
)
from processes import in_processes
from safetensors.torch import load_file

from rlhf_ppo.runtime.checkpoints.checkpoint import verify_checkpoint
from rlhf_ppo.training.checkpoints.black_box import read_black_box

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
        held, whole = one["bytes"]
        assert held < 0.56 * whole  # its half, vectors, and AdamW's counts of steps
        # Each of 18 steps: its half of the weights in forward and backward passes, and a whole gradient.
        assert one["exchanged"] > 18 * 2 * whole / 3


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kind"), [(3, "full"), (4, "full"), (4, "hybrid")])
def test_more_processes_that_share_the_weights_train_as_one(saved, count, kind):
    folder = saved("gpt2")
    given = (
        {"lora_rank": 3} if count == 3 else {}
    )  # of three rows of an adapter's factor, four processes cannot all have one
    alone = train(folder, {}, given)
    settings = {**SHARDED, "sharding": kind, "output_dir": f"{folder}/sharded"}
    for one in in_processes(count, train_on_machines_of_two if kind == "hybrid" else train, folder, settings, given):
        require_equal(alone, one, 1e-9)
    resumed = {"output_dir": f"{folder}/resumed", "save_every": 2}
    require_equal(
        {**alone, "metrics": alone["metrics"][2:]}, train(folder, resumed, given, f"{folder}/sharded/checkpoint-2")
    )


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fault_18_a_gradient_that_is_nan_on_one_process_skips_the_step_on_all(saved, count):
    folder = saved("gpt2")
    settings = {**SHARDED, "output_dir": f"{folder}/sharded"}
    one, *others = in_processes(count, train, folder, settings, {}, None, None, True)
    for other in others:
        require_equal(one, other, 0.0)
    assert [metrics["optim/skipped_steps"] for metrics in one["metrics"][:3]] == [1, 0, 0]
    (box,) = Path(folder, "sharded").glob("blackbox-*")
    weights = read_black_box(box).weights
    assert {name: tuple(x.shape) for name, x in weights.items()} == {n: x.shape for n, x in one["weights"].items()}


@pytest.mark.parametrize("decoding", [pytest.param("whole", marks=pytest.mark.slow), "layers"])
def test_fault_22_a_signal_to_one_process_stops_all_with_a_checkpoint(saved, decoding):
    folder = saved("gpt2")
    settings = {**SHARDED, "sharded_decoding": decoding, "output_dir": f"{folder}/sharded"}
    expected = (143, f"{folder}/sharded/checkpoint-1")
    assert in_processes(2, stop_while_sampling, folder, settings) == [expected, expected]
    assert verify_checkpoint(expected[1]) == []


def test_a_sharded_run_in_bfloat16_samples_and_trains_the_same_distribution(saved):
    settings = {**SHARDED, "precision": "bf16", "output_dir": f"{saved('llama')}/sharded"}
    for found in in_processes(2, train_in_bfloat16, settings):
        assert all(0 <= metrics["policy/first_minibatch_max_abs_log_ratio"] < 0.1 for metrics in found)
        assert all(metrics["optim/skipped_steps"] == 0 for metrics in found)


CRITICS = [
    ({"gradient_checkpointing": True, "recompute_logprobs": True, "save_rollouts": True}, {"critic": "separate"}),
    ({"critic": "adapter", "sharded_decoding": "layers", "max_turns": 3}, {"lora_rank": 3, "talks": True}),
    ({"kl_loss_coef": 0.1, "kl_loss": "exact", "critic_epochs": 3, "critic_warmup_rollouts": 1}, {}),
]


@pytest.mark.parametrize(("settings", "given"), CRITICS)
def test_critics_of_every_kind_and_adapters_learn_the_same_under_sharding(saved, settings, given):
    folder = saved("llama")
    alone = train(folder, {x: y for x, y in settings.items() if x != "sharded_decoding"}, given)
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


def test_processes_share_a_reward_models_weights_too(saved, tmp_path, make_classifier, tokenizer):
    folder = saved("llama")
    make_classifier("gpt2").save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    settings = {"rollout_batch_size": 10, "num_minibatches": 2, "num_generations": 2, "cache_rewards": True}
    alone = train(folder, settings, {"judge": True})
    sharded = {**SHARDED, **settings, "output_dir": f"{folder}/sharded"}
    for found in in_processes(2, train, folder, sharded, {"judge": True}):
        require_equal(alone, found, 1e-6)  # the judge computes in float32
        assert found["shared judges"] == 1


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
