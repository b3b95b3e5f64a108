"""Whether a run is sharded: the arithmetic, what is said about it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_ppo import RLHFConfig
from rlhf_ppo.generation.engines import choose_engine
from rlhf_ppo.models.sharding import make_sharding
from rlhf_ppo.runtime.processes.group import ALONE, ProcessGroup
from rlhf_ppo.training import shard_models
from rlhf_ppo.training.shard_models import Plan, plan_sharding

CPU = torch.device("cpu")


@pytest.fixture
def plan(monkeypatch, make_model):
    """``plan(memory, **settings)`` for two processes and a model of P parameters, with P as ``plan.size``."""
    monkeypatch.setattr(
        shard_models, "make_sharding", lambda *, hybrid, device, bf16, count: ("sharding", hybrid, bf16)
    )
    model = make_model("llama")

    def make(memory: float, adapter: bool = False, bf16: bool = False, critic: Any = None, **settings: Any) -> Plan:
        monkeypatch.setattr(shard_models, "device_memory", lambda device: memory)
        args = RLHFConfig(output_dir="run", **settings)
        given = {"adapter": adapter, "device": CPU, "bf16": bf16, "processes": ProcessGroup(0, 2)}
        return plan_sharding(args, model, critic, **given)

    make.size, make.model = sum(p.numel() for p in model.parameters()), model  # pyright: ignore
    return make


def test_auto_shards_what_would_take_more_than_four_fifths_of_the_memory(plan):
    held = 20 * plan.size  # 16 bytes of a trained parameter and 4 of the reference's
    assert plan(held / 0.8 + 1).sharding is None
    assert plan(held / 0.8 - 1).sharding == ("sharding", False, False)
    words = plan(held / 0.8 - 1).words
    assert words.startswith("2, sharding=full (auto: ") and "above 80%): each holds its share" in words
    assert plan(held, critic=plan.model).words.count(f"{36 * plan.size / 1e9:.3g} GB") == 1
    assert plan(4 * plan.size / 0.8 + 1, adapter=True).sharding is None
    assert plan(18 * plan.size / 0.8 + 1, reference_dtype="bfloat16").sharding is None


def test_decoding_gathers_all_weights_where_they_fit_beside_the_share(plan):
    fits = (10 + 4) * plan.size / 0.8 + 1  # half of 20 bytes, and the weights in float32
    assert plan(fits, sharding="full").decoding == "whole"
    assert plan(fits - 2, sharding="full").decoding == "layers"
    assert plan(12 * plan.size / 0.8 + 1, sharding="full", bf16=True).decoding == "whole"
    assert plan(1, sharding="full", sharded_decoding="whole").decoding == "whole"
    assert "layer by layer" in plan(1e9, sharding="hybrid", sharded_decoding="layers").words


def test_what_the_user_says_is_done_and_one_process_shares_with_none(plan):
    assert plan(1, sharding="none").words == "2, sharding=none: each holds all weights"
    assert plan(1e12, sharding="hybrid").sharding == ("sharding", True, False)
    assert plan(1e12, quantization="4bit").words.endswith("the quantised base is whole on each, with its adapter")
    alone = {"adapter": False, "device": CPU, "bf16": False, "processes": ALONE}
    assert plan_sharding(RLHFConfig(output_dir="run", sharding="full"), plan.model, None, **alone).sharding is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sharding": "full", "quantization": "8bit"}, "sharding='full'.*quantization='8bit'.*set sharding='none'"),
        ({"sharding": "none", "sharded_decoding": "layers"}, "sharded_decoding.*sharding='none'"),
        ({"sharding": "zero"}, "sharding"),
    ],
)
def test_settings_that_contradict_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        RLHFConfig(output_dir="run", **settings)


def test_machines_of_different_size_are_refused_for_hybrid(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"3 processes do not divide into 2 a node.*set sharding='full'"):
        make_sharding(hybrid=True, device=CPU, bf16=False)


def test_static_decoding_of_shared_weights_is_refused(monkeypatch, make_trainer):
    monkeypatch.setattr("rlhf_ppo.generation.engines.is_sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"generation='static'.*sharding='none'"):
        choose_engine(RLHFConfig(output_dir="run", generation="static"), make_trainer().model)
