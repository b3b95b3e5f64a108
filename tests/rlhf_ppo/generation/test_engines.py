"""Engines: each samples from the policy's own softmax, with the weights as they are now, and records what it did."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.model_runner import ModelRunner

import rlhf_ppo.generation.engines
from rlhf_ppo.cli import main
from rlhf_ppo.data.prompts import left_pad
from rlhf_ppo.generation.engines import ContinuousEngine, GenerationError, StaticEngine, choose_engine
from rlhf_ppo.generation.rollout import Sampled, sample_responses
from rlhf_ppo.models.actor_critic import ActorCritic

KINDS = ["gpt2", "llama", "qwen2", "gpt_neox", "opt"]
ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.7, "stop_token_ids": (0, 12, 16, 20)}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Five prompts of 1 to 5 tokens."""
    return left_pad([[7], [3, 0, 5], [9, 8, 7, 6, 5], [4, 4, 4], [1, 2]], 0, CPU)


@pytest.fixture
def make(make_model, wake_critic):
    """``make(kind)``: an actor-critic whose values differ."""

    def make_actor_critic(kind: str = "gpt2", **settings: Any) -> ActorCritic:
        model = ActorCritic(make_model(kind, **settings))
        wake_critic(model)
        return model

    return make_actor_critic


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_equals_a_full_forward(model: ActorCritic, batch: tuple[Tensor, Tensor], sampled: Sampled) -> None:
    with torch.no_grad():
        full = model(*batch, sampled.response_ids, sampled.mask, temperature=0.7)
    # Decoding adds up the same products in another order: a few rounding errors of float32.
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(sampled.logprobs, full.logprobs, **close)
    torch.testing.assert_close(sampled.entropy, full.entropy, **close)
    torch.testing.assert_close(sampled.values, full.values, **close)


def assert_well_formed(sampled: Sampled) -> None:
    """Every response ends with its only stop token, or at the limit."""
    stops = torch.isin(sampled.response_ids, torch.tensor(SETTINGS["stop_token_ids"])) & sampled.mask
    lengths = sampled.mask.sum(dim=1)
    assert lengths.max() == sampled.mask.shape[1] and (lengths[~sampled.finished] == SETTINGS["max_new_tokens"]).all()
    assert (sampled.mask[:, :-1] >= sampled.mask[:, 1:]).all()
    assert torch.equal(stops.sum(dim=1), sampled.finished.long())
    assert stops[torch.arange(len(lengths)), lengths - 1].equal(sampled.finished)
    assert not sampled.response_ids[~sampled.mask].any() and not sampled.logprobs[~sampled.mask].any()


# Fixed shapes


@pytest.mark.parametrize("kind", [*KINDS, "bloom"])
def test_static_gives_the_same_responses_as_dynamic(make, batch, kind):
    model, engine = make(kind), StaticEngine(compile_step=False)
    for seed in (3, 4):  # the second rollout meets a used cache
        dynamic = sample_responses(model, *batch, generator=seeded(seed), **SETTINGS)
        static = engine(model, *batch, generator=seeded(seed), **SETTINGS)
        assert torch.equal(static.response_ids, dynamic.response_ids) and torch.equal(static.mask, dynamic.mask)
        assert torch.equal(static.finished, dynamic.finished)
        for ours, theirs in zip(static[3:], dynamic[3:], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_static_keeps_one_cache_and_makes_another_for_another_shape(make, batch):
    model, engine = make(), StaticEngine(compile_step=False)
    engine(model, *batch, **SETTINGS)
    first = engine._fixed
    engine(model, batch[0][:, 1:], batch[1][:, 1:], **SETTINGS)  # shorter prompts fit the same room
    assert engine._fixed is first
    engine(model, batch[0][:4], batch[1][:4], **SETTINGS)
    assert engine._fixed is not first


def test_static_reads_the_weights_of_today(make, batch):
    model, engine = make(), StaticEngine(compile_step=False)
    engine(model, *batch, generator=seeded(), **SETTINGS)
    change(model)
    assert_equals_a_full_forward(model, batch, engine(model, *batch, generator=seeded(), **SETTINGS))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_static_step_is_one_graph(make, batch, kind):
    """fullgraph=True fails at anything that torch.compile cannot capture; "eager" runs what was captured."""
    model, engine = make(kind), StaticEngine(compile_step=True, backend="eager")
    dynamic = sample_responses(model, *batch, generator=seeded(), **SETTINGS)
    for _ in range(2):
        static = engine(model, *batch, generator=seeded(), **SETTINGS)
        assert torch.equal(static.response_ids, dynamic.response_ids)
        torch.testing.assert_close(static.logprobs, dynamic.logprobs, atol=1e-5, rtol=1e-5)
    change(model)  # the graph holds the weights by reference
    assert_equals_a_full_forward(model, batch, engine(model, *batch, generator=seeded(), **SETTINGS))
    torch.compiler.reset()


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
    dynamic = sample_responses(model, *batch, generator=seeded(), **SETTINGS)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="no such kernel"):
        static = engine(model, *batch, generator=seeded(), **SETTINGS)
    assert torch.equal(static.response_ids, dynamic.response_ids)
    torch.testing.assert_close(static.logprobs, dynamic.logprobs, atol=1e-5, rtol=1e-5)


# Continuous batching


def change(model: ActorCritic) -> None:
    """A stand-in for an optimizer step that is large enough to see."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=seeded(number)))


@pytest.mark.parametrize("kind", KINDS)
def test_continuous_records_the_distribution_that_it_sampled_from(make, batch, kind):
    """At temperature 0.7, with left padding, whatever the model's own generation config says; in the prompts' order."""
    model = make(kind)
    policy: Any = model.policy
    policy.generation_config.update(top_k=2, top_p=0.3, repetition_penalty=5.0, temperature=0.1, do_sample=True)
    before = policy.config.to_dict(), policy.config._attn_implementation, policy.generation_config.to_dict()
    random_state = torch.get_rng_state()
    sampled = ContinuousEngine(max_tokens=16)(model, *batch, generator=seeded(), **SETTINGS)
    assert_well_formed(sampled)
    assert_equals_a_full_forward(model, batch, sampled)
    assert (policy.config.to_dict(), policy.config._attn_implementation, policy.generation_config.to_dict()) == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_continuous_draws_from_the_softmax(make):
    """400 draws of one token over a vocabulary of 6 with temperature 0.7, tested against their standard deviations."""
    model, n = make(vocab_size=6), 400
    model.policy.generation_config.update(top_k=1, do_sample=False)
    ids, mask = torch.tensor([[1, 2]]).expand(n, 2), torch.ones(n, 2, dtype=torch.bool)
    sampled = ContinuousEngine(10_000)(
        model, ids, mask, max_new_tokens=1, temperature=0.7, stop_token_ids=(), generator=seeded()
    )
    with torch.no_grad():
        p = model.policy(ids[:1]).logits[0, -1].div(0.7).softmax(-1)
    share = torch.bincount(sampled.response_ids[:, 0], minlength=6) / n
    assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-6).all()


def test_continuous_same_generator_same_rollout(make, batch):
    model, engine = make(), ContinuousEngine(1000)
    first, again, other = (engine(model, *batch, generator=seeded(seed), **SETTINGS) for seed in (3, 3, 4))
    assert torch.equal(first.response_ids, again.response_ids) and torch.equal(first.logprobs, again.logprobs)
    assert first.response_ids.shape != other.response_ids.shape or not torch.equal(
        first.response_ids, other.response_ids
    )


@pytest.mark.parametrize("sharing", [False, True])
def test_continuous_never_answers_with_yesterdays_weights(make, monkeypatch, sharing):
    """The trap: blocks of a prompt kept from before an update. With persistence and sharing put back it shows."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model, engine = make(), ContinuousEngine(1000)
    ids = torch.arange(1, 25)[None].repeat(3, 1) % 30  # 24 tokens: one whole block of 16 can be shared
    batch = ids, torch.ones_like(ids, dtype=torch.bool)
    if sharing:
        # A persistent manager that may share blocks, as generate_batch(persistent_manager=True) keeps it.
        made = ContinuousBatchingConfig.__init__

        def share(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **{**kwargs, "allow_block_sharing": True})

        monkeypatch.setattr(ContinuousBatchingConfig, "__init__", share)
        stop = continuous_api.ContinuousBatchingManager.stop
        keep = {"keep_for_next_session": True}
        monkeypatch.setattr(
            continuous_api.ContinuousBatchingManager, "stop", lambda self, **kwargs: stop(self, **{**kwargs, **keep})
        )
        monkeypatch.setattr(continuous_api.BackgroundThreadStatus, "can_accept_new_requests", lambda self: None)
    engine(model, *batch, generator=seeded(), **SETTINGS)
    change(model)
    sampled = engine(model, *batch, generator=seeded(), **SETTINGS)
    if sharing:
        with pytest.raises(AssertionError, match="not close"):
            assert_equals_a_full_forward(model, batch, sampled)
    else:
        assert_equals_a_full_forward(model, batch, sampled)


def test_continuous_says_why_it_failed(make, batch, monkeypatch):
    """transformers logs the error and returns what it has."""

    def fail(*_: Any) -> None:
        raise RuntimeError("out of pages")

    monkeypatch.setattr(ModelRunner, "compute_batch", fail)
    with pytest.raises(GenerationError, match="prompt 0: out of pages"):
        ContinuousEngine(1000)(make(), *batch, generator=seeded(), **SETTINGS)


def test_continuous_in_bfloat16(make, batch):
    """Autocast belongs to a thread; the generation thread must compute as this one does."""
    model = make("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sampled = ContinuousEngine(1000)(model, *batch, generator=seeded(), **SETTINGS)
        with torch.no_grad():
            full = model(*batch, sampled.response_ids, sampled.mask, temperature=0.7)
    # bfloat16 keeps 8 bits: logits of a few units are right to some hundredths.
    torch.testing.assert_close(sampled.logprobs, full.logprobs, atol=0.1, rtol=0)


# Choosing


def test_auto_is_dynamic_without_a_gpu(make):
    assert choose_engine("auto", make(), max_tokens=100) is sample_responses


def test_a_model_that_continuous_batching_reads_wrongly_is_refused(make_trainer, make_model):
    """Bloom's attention does not go through transformers' interface: it would attend across the prompts, silently."""
    with pytest.raises(ValueError, match=r"generation='continuous' does not work with model=BloomForCausalLM"):
        make_trainer(model=make_model("bloom"), generation="continuous")


def test_a_model_without_generate_batch_is_refused(make, monkeypatch):
    model = make()
    monkeypatch.setattr(
        rlhf_ppo.generation.engines, "without_adapter_wrapper", lambda policy: torch.nn.ModuleDict({"policy": policy})
    )
    with pytest.raises(ValueError, match="generation='continuous' does not work with model=ModuleDict"):
        choose_engine("continuous", model, max_tokens=100)


def test_an_unknown_engine_is_refused(make_trainer):
    with pytest.raises(ValueError, match="generation"):
        make_trainer(generation="vllm")


@pytest.mark.parametrize("generation", ["static", "continuous"])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_trains_on_what_the_engine_recorded(make_trainer, make_model, generation, adapter):
    """The first ratio of every rollout is 1, after updates too."""
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if adapter else None
    trainer = make_trainer(
        model=make_model("llama"), peft_config=lora, generation=generation, learning_rate=1e-2, total_episodes=24
    )
    trainer.train()
    rows = [json.loads(line) for line in (trainer.run.path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(row["policy/first_minibatch_max_abs_log_ratio"] < 1e-5 for row in rows)


def test_continuous_with_a_separate_critic(make_trainer, make_model):
    trainer = make_trainer(generation="continuous", value_model=make_model("llama", seed=4))
    rollout = trainer.rollout(["the cat"] * 8)
    assert rollout.values is not None
    trainer.step(rollout)


def test_continuous_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = ["--config", "examples/positive.yaml", "--reward", "rlhf_ppo.rewards.toy:no_letter_e", "--device", "cpu"]
    run += ["--precision", "fp32"]  # "auto" would be bf16 on some CPUs, whose gap between engine and update varies
    sizes = ["--total-episodes", "32", "--max-new-tokens", "6", "--eval-size", "4", "--output-dir", str(tmp_path)]
    assert main(["train", *run, "--generation", "continuous", *sizes]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["generation"] == "continuous"


def test_the_gpu_benchmark_measures_every_engine(tmp_path):
    """On a model of a few thousand weights; without a GPU the real one says so in one line."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    numbers = tmp_path / "numbers.json"
    flags = ["--tiny", "--device", "cpu", "--iterations", "1", "--json", str(numbers)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["generation"] for row in rows] == ["dynamic", "static", "continuous"]
    assert all(row["generated_tokens_per_second"] == pytest.approx(6 * row["samples_per_second"]) for row in rows)
    assert done.stdout.count("| tiny GPT-2 |") == 3


def test_the_gpu_benchmark_counts_what_gpt2_needs():
    """GPT-2 small: 12 x 12 x 768^2 = 84,934,656 weights in the products of its trunk, 50,257 x 768 in its head."""
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    gpu = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    sys.modules["gpu"] = gpu  # its dataclasses look their own module up
    try:
        spec.loader.exec_module(gpu)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        del sys.modules["gpu"]
    config = GPT2Config()
    with torch.device("meta"):
        needs = gpu.Needs.of(AutoModelForCausalLM.from_config(config), config)
    assert (needs.trunk, needs.head) == (84_934_656, 50_257 * 768)
    assert needs.kv_bytes_per_token == 2 * 2 * 12 * 768  # keys and values, 2 bytes each, 12 layers
    # One sequence of one prompt and one response token: one token read, one predicted, attention to itself.
    case = gpu.Case(config, prompts=1, prompt_tokens=1, new_tokens=1)
    assert needs.forward(case) == 2 * (84_934_656 + 50_257 * 768) + 2 * 12 * 768
