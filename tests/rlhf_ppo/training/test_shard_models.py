"""Whether a run is sharded: the arithmetic, what is said about it, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MixtralConfig

from rlhf_ppo import RLHFConfig
from rlhf_ppo.generation.engines import choose_engine
from rlhf_ppo.models.adapters.lora import lora_config
from rlhf_ppo.models.costs.cards import CPU as CPU_CARD
from rlhf_ppo.models.costs.cards import find_card
from rlhf_ppo.models.costs.memory import peak, peaks
from rlhf_ppo.models.costs.shapes import read_shape
from rlhf_ppo.models.costs.terms import total
from rlhf_ppo.models.costs.weights import held
from rlhf_ppo.models.sharded.sharding import make_sharding
from rlhf_ppo.runtime.processes.group import ALONE, ProcessGroup
from rlhf_ppo.runtime.processes.launch import Launch
from rlhf_ppo.training.models import shard_models
from rlhf_ppo.training.models.shard_models import plan_sharding, run_setup

CPU = torch.device("cpu")
CPU_SHARE = CPU_CARD.usable


@pytest.fixture
def plan(monkeypatch, make_model):
    """``plan(memory, **settings)`` for two processes; without a memory, the setup whose costs are compared with it."""
    monkeypatch.setattr(
        shard_models, "make_sharding", lambda *, hybrid, device, bf16, count: ("sharding", hybrid, bf16)
    )
    model, two = make_model("llama"), ProcessGroup(0, 2)
    monkeypatch.setattr(shard_models, "read_launch", lambda: Launch(0, 2, 0, 2))

    def make(memory: float | None = None, peft: Any = None, value_model: Any = None, **settings: Any) -> Any:
        card = replace(find_card("cpu"), memory=2 * (memory or 0) / CPU_SHARE)
        monkeypatch.setattr(shard_models, "own_card", lambda device: card)
        trains, policy = settings.pop("trains", True), settings.pop("model", model)
        critic = "shared" if value_model is None else "separate"
        about = {"critic": critic, "sets": (), "trains": trains, "bf16": settings.pop("bf16", False)}
        args = RLHFConfig(output_dir="run", **{"max_new_tokens": 20, **settings})
        setup = partial(run_setup, policy, None, value_model, peft, {}, args, CPU, two, **about)
        return setup() if memory is None else plan_sharding(setup, args, CPU, two)

    make.model = model  # pyright: ignore
    return make


def test_auto_shards_what_would_not_fit_by_the_peaks_of_all_phases(plan):
    most = peak(plan())
    assert plan(most).sharding is None
    assert plan(most - 1).sharding == ("sharding", False, False)
    words = plan(most - 1).words
    assert re.match(
        r"2, sharding=full \(auto: with all weights on each, generate takes [\d.]+ GB of [\d.]+ GB\): ", words
    )
    assert "): each holds its share of the weights; " in words
    # Activations count: of long responses the same weights do not fit.
    assert plan(most, max_new_tokens=200).sharding is not None
    assert plan(most, value_model=plan.model).sharding is not None
    assert plan(most - 1, gradient_checkpointing=True, reference_dtype="bfloat16").sharding is None
    assert plan(most - 1, peft=lora_config(2)).sharding is None


def test_an_evaluation_counts_no_optimizer(plan):
    evaluated, trained = plan(trains=False), plan()
    assert evaluated.trained == 0 and set(peaks(evaluated)) == {"generate", "reference"}
    assert total(held(trained)) - total(held(evaluated)) == 8 * trained.trained
    assert plan(peak(evaluated), trains=False).sharding is None
    assert plan(peak(evaluated)).sharding is not None


def test_decoding_gathers_all_weights_where_they_fit_beside_the_share(plan):
    full = {"sharding": "full", "bf16": True}
    whole = peaks(replace(plan(**full), sharding="full"))["generate"]
    assert plan(whole, **full).decoding == "whole"
    assert plan(whole - 1, **full).decoding == "layers"
    assert plan(1, sharding="full", sharded_decoding="whole").decoding == "whole"
    assert "layer by layer" in plan(1e9, sharding="hybrid", sharded_decoding="layers").words


def test_sharded_layers_are_not_compiled(plan):
    with pytest.raises(ValueError, match=r"compile='always' needs all weights .*, but sharding='full' shares"):
        plan(1, sharding="full", compile="always")
    assert plan(1, sharding="none", compile="always").sharding is None


def test_what_the_user_says_is_done_and_one_process_shares_with_none(plan):
    args = RLHFConfig(output_dir="run", sharding="full")
    assert plan_sharding(plan, args, CPU, ALONE).sharding is None
    assert plan(1, sharding="none").words == "2, sharding=none: each holds all weights"
    assert plan(1e12, sharding="hybrid").sharding == ("sharding", True, False)
    assert plan(1e12, quantization="4bit").words.endswith("the quantised base is whole on each, with its adapter")


@pytest.mark.parametrize("kind", [MixtralConfig, MambaConfig])
def test_of_models_that_plan_refuses_the_weights_are_counted(plan, kind):
    model = AutoModelForCausalLM.from_config(
        kind(hidden_size=32, num_hidden_layers=2, vocab_size=50, intermediate_size=64)
    )
    with pytest.raises(ValueError, match="plan counts plain transformers"):
        read_shape(model.config)
    shape = plan(model=model).policy
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert plan(1, model=model).sharding is not None and plan(1e12, model=model).sharding is None


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
