"""Engines: each samples from the policy's own softmax with its current weights, and records what it did."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from rlhf_ppo.config.groups import RolloutSettings
from rlhf_ppo.data.tokenization import left_pad
from rlhf_ppo.generation.decoding import sample_responses
from rlhf_ppo.generation.engines import StaticEngine, choose_engine
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.slot_cache import SlotLayer

KINDS = ["gpt2", "llama", "qwen2", "gpt_neox", "opt"]
ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
PARAMS = SamplingParams(max_new_tokens=8, temperature=0.7, stop_token_ids=(0, 12, 16, 20))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Five prompts of 1 to 5 tokens."""
    return left_pad([[7], [3, 0, 5], [9, 8, 7, 6, 5], [4, 4, 4], [1, 2]], CPU)


def assert_equals_a_full_forward(model: ActorCritic, batch: tuple[Tensor, Tensor], sampled: SampledResponses) -> None:
    with torch.no_grad():
        full = model(*batch, sampled.response_ids, sampled.mask, temperature=0.7)
    # Decoding adds up the same products in another order: a few rounding errors of float32.
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(sampled.logprobs, full.logprobs, **close)
    torch.testing.assert_close(sampled.entropy, full.entropy, **close)
    torch.testing.assert_close(sampled.values, full.values, **close)


def change(model: ActorCritic) -> None:
    """A stand-in for an optimizer step that is large enough to see."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=seeded(number)))


# Fixed shapes


@pytest.mark.parametrize("kind", [*KINDS, "bloom"])
def test_static_gives_the_same_responses_as_dynamic(make, batch, kind):
    model, engine = make(kind), StaticEngine(compile_step=False)
    for seed in (3, 4):  # the second rollout meets a used cache
        dynamic = sample_responses(model, *batch, PARAMS, generator=seeded(seed))
        static = engine(model, *batch, PARAMS, generator=seeded(seed))
        assert torch.equal(static.response_ids, dynamic.response_ids) and torch.equal(static.mask, dynamic.mask)
        assert torch.equal(static.finished, dynamic.finished)
        for ours, theirs in zip(static[3:], dynamic[3:], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_static_keeps_one_cache_and_makes_another_for_another_shape(make, batch):
    model, engine = make(), StaticEngine(compile_step=False)
    engine(model, *batch, PARAMS)
    first = engine._fixed
    engine(model, batch[0][:, 1:], batch[1][:, 1:], PARAMS)  # shorter prompts fit the same room
    assert engine._fixed is first
    engine(model, batch[0][:4], batch[1][:4], PARAMS)
    assert engine._fixed is not first


def test_static_uses_the_current_weights(make, batch):
    model, engine = make(), StaticEngine(compile_step=False)
    engine(model, *batch, PARAMS, generator=seeded())
    change(model)
    assert_equals_a_full_forward(model, batch, engine(model, *batch, PARAMS, generator=seeded()))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_static_step_is_one_graph(make, batch, kind):
    """fullgraph=True fails at anything that torch.compile cannot capture; the graph outlives changes of the weights."""
    captured: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        captured.append(graph)
        return graph.forward

    model = make(kind)
    engine = StaticEngine(compile_step=True, slots=2, backend=backend)
    dynamic = sample_responses(model, *batch, PARAMS, generator=seeded())
    for _ in range(2):
        static = engine(model, *batch, PARAMS, generator=seeded())
        assert torch.equal(static.response_ids, dynamic.response_ids)
        torch.testing.assert_close(static.logprobs, dynamic.logprobs, atol=1e-5, rtol=1e-5)
    change(model)  # the graph holds the weights by reference
    assert_equals_a_full_forward(model, batch, engine(model, *batch, PARAMS, generator=seeded()))
    assert engine.compile_step and len(captured) == 1
    torch.compiler.reset()


def test_static_makes_another_cache_for_weights_of_another_format(make, batch):
    """As with a working copy in bfloat16: keys and values are kept as attention reads them."""
    model, engine = make("llama"), StaticEngine(compile_step=False)
    for change_format, autocast, expected in (
        (lambda: None, False, torch.float32),
        (lambda: None, True, torch.bfloat16),
        (model.policy.bfloat16, False, torch.bfloat16),
    ):
        change_format()
        before = engine._fixed
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            engine(model, *batch, PARAMS)
            assert engine._fixed is not before
            kept, layer = engine._fixed, engine._fixed.cache.layers[0]
            assert layer.keys.dtype == layer.values.dtype == expected
            engine(model, *batch, PARAMS)
            assert engine._fixed is kept


def test_a_step_that_cannot_be_compiled_is_a_warning(make, batch, monkeypatch):
    """The rollout starts again with the same draws."""

    def broken(step: Any, **_: Any) -> Any:
        calls = iter(range(2))

        def fails_at_the_second(*inputs: Tensor) -> Any:
            if next(calls):
                raise RuntimeError("no such kernel")
            return step(*inputs)

        return fails_at_the_second

    model, engine = make(), StaticEngine(compile_step=True)
    dynamic = sample_responses(model, *batch, PARAMS, generator=seeded())
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="no such kernel"):
        static = engine(model, *batch, PARAMS, generator=seeded())
    assert torch.equal(static.response_ids, dynamic.response_ids)
    torch.testing.assert_close(static.logprobs, dynamic.logprobs, atol=1e-5, rtol=1e-5)


def test_static_refuses_what_only_the_dynamic_loop_does(make, batch):
    with pytest.raises(ValueError, match="use generation='dynamic'"):
        StaticEngine(compile_step=False)(make(), *batch, SamplingParams(max_new_tokens=8, stop_strings=("a",)))


# Choosing


def test_auto_is_dynamic_without_a_gpu(make):
    assert choose_engine(RolloutSettings(generation="auto"), make()) is sample_responses


def test_a_model_that_reads_a_fixed_cache_wrongly_is_refused(make, monkeypatch):
    """The values that attention reads are doubled, so the log-probs are those of another model."""
    update = SlotLayer.update

    def doubled(*states, **others):
        keys, values = update(*states, **others)
        return keys, 2 * values

    monkeypatch.setattr(SlotLayer, "update", doubled)
    with pytest.raises(ValueError, match=r"'static' .* model=GPT2LMHeadModel: its log-probs are .*'dynamic'"):
        choose_engine(RolloutSettings(generation="static"), make())


def test_a_model_without_a_cache_is_refused(make):
    model = make()
    model.runner.uses_cache = False
    with pytest.raises(ValueError, match=r"generation='static' does not work with model=.*cannot decode from a cache"):
        choose_engine(RolloutSettings(generation="static"), model)


def test_an_unknown_engine_is_refused(make_trainer):
    with pytest.raises(ValueError, match="generation"):
        make_trainer(generation="vllm")


def test_the_removed_engine_is_named_with_what_to_use_instead(make_trainer):
    with pytest.raises(ValueError, match=r"generation='continuous'.*generation='auto'"):
        make_trainer(generation="continuous")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_trains_on_what_the_engine_recorded(make_trainer, make_model, adapter):
    """The first ratio of every rollout is 1, after updates too."""
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if adapter else None
    trainer = make_trainer(
        model=make_model("llama"), peft_config=lora, generation="static", learning_rate=1e-2, total_episodes=24
    )
    trainer.train()
    rows = [json.loads(line) for line in (trainer.run.path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(row["policy/first_minibatch_max_abs_log_ratio"] < 1e-5 for row in rows)


@pytest.fixture
def gpu(monkeypatch):
    """The module benchmarks/gpu.py."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # it sets this itself
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)  # its dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def test_the_gpu_benchmark_measures_every_engine(gpu, tmp_path, capsys):
    """On a model of a few thousand weights."""
    file = tmp_path / "rows.jsonl"
    words = ["--tiny", "--device", "cpu", "--iterations", "1", "--models", "GPT-2 124M", "--jsonl", str(file)]
    with torch.random.fork_rng():
        assert gpu.main(words) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["way"] for row in rows] == list(gpu.ENGINES)
    assert all(row["generated_tokens_per_second"] == pytest.approx(6 * row["samples_per_second"]) for row in rows)
    assert capsys.readouterr().out.count("| GPT-2 124M |") == len(rows)


def test_the_gpu_benchmark_says_what_it_leaves_out_and_what_failed(gpu, capsys):
    device, case = torch.device("cpu"), gpu.cases(tiny=True)["GPT-2 124M"]
    row = gpu.measured("m", case, "QLoRA", device, {}, 1)
    assert (row["outcome"], row["why"]) == ("left out", "needs a CUDA GPU")
    row = gpu.measured("m", case, "dynamic", device, {}, 1)  # without the device's limits
    assert row["outcome"] == "failed" and "| m | dynamic | failed: KeyError" in gpu.table_row(row)
    with torch.random.fork_rng():
        row = gpu.measured("m", case, "sharded", device, gpu.measure_limits(device, tiny=True), 1)
    assert row["outcome"] == "measured", row
    assert gpu.main(["--tiny", "--device", "cpu", "--models", "no such"]) == 2
    assert "known: GPT-2 124M, Llama 1.1B" in capsys.readouterr().out


def test_the_gpu_benchmark_counts_what_gpt2_needs(gpu):
    """GPT-2 small: 12 x 12 x 768^2 = 84,934,656 weights in the products of its trunk, 50,257 x 768 in its head."""
    config = GPT2Config()
    with torch.device("meta"):
        needs = gpu.Needs.of(AutoModelForCausalLM.from_config(config), config)
    assert (needs.trunk, needs.head) == (84_934_656, 50_257 * 768)
    assert needs.kv_bytes_per_token == 2 * 2 * 12 * 768  # keys and values, 2 bytes each, 12 layers
    # One sequence of one prompt and one response token: one token read, one predicted, attention to itself.
    case = gpu.Case(config, prompts=1, prompt_tokens=1, new_tokens=1)
    assert needs.forward(case) == 2 * (84_934_656 + 50_257 * 768) + 2 * 12 * 768
