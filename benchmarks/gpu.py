"""Time PPO iterations on one CUDA GPU against the hardware's limits: ``python benchmarks/gpu.py``.

What you will see: a table with a row for each model and way to run it, after a few minutes. MFU counts the products
that the algorithm needs, relative to the measured rate of bf16 products; the decoding limit is the time to move weights
(bf16), keys and values once per decode step at the measured copy bandwidth. ``--ways`` names decoding engines, and
ways to save memory or time in updates.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from speed_workloads import Workload, make_prompts, make_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.models.sharded.sharding import make_sharding
from rlhf_ppo.runtime.logs.run_directory import append_line
from rlhf_ppo.runtime.machine.device import compute_in_bf16, resolve_device
from rlhf_ppo.training import setup
from rlhf_ppo.training.models.shard_models import Plan


@dataclass(frozen=True)
class Way:
    """A way to run the same iterations."""

    settings: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    """Train an adapter of rank 16."""
    sharded: bool = False
    """By FSDP2, over this process alone."""
    needs: str | None = None
    """A module without which the way is left out."""
    cuda_only: bool = False


DYNAMIC = {"generation": "dynamic"}
ENGINES = {"static": Way({"generation": "static"}), "dynamic": Way(DYNAMIC)}
WAYS = {
    **ENGINES,
    "checkpointed": Way({**DYNAMIC, "gradient_checkpointing": True}),
    "offloaded": Way({**DYNAMIC, "offload_activations": True}, cuda_only=True),
    "sharded": Way(DYNAMIC, sharded=True),
    "compiled": Way({**DYNAMIC, "compile": "always"}),
    "LoRA": Way(DYNAMIC, lora=True),
    "QLoRA": Way({**DYNAMIC, "quantization": "4bit"}, lora=True, needs="bitsandbytes", cuda_only=True),
}


@dataclass(frozen=True)
class Case:
    """A model with random weights and the size of its iterations."""

    config: PretrainedConfig
    prompts: int
    prompt_tokens: int
    new_tokens: int
    epochs: int = 4
    minibatches: int = 4

    @property
    def tokens(self) -> int:
        """Return how many tokens of a sequence a model processes."""
        return self.prompt_tokens + self.new_tokens - 1


def cases(tiny: bool) -> dict[str, Case]:
    """Return the models to measure."""
    if tiny:
        small: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
        gpt2 = GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, **small)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        llama = LlamaConfig(num_key_value_heads=1, max_position_embeddings=32, **shape, **small)
        configs = {"GPT-2 124M": gpt2, "Llama 1.1B": llama}
        size = {"prompts": 4, "prompt_tokens": 4, "new_tokens": 6, "epochs": 1, "minibatches": 2}
        return {name: Case(config, **size) for name, config in configs.items()}
    llama = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    return {
        "GPT-2 124M": Case(GPT2Config(), prompts=256, prompt_tokens=64, new_tokens=128),
        "Llama 1.1B": Case(llama, prompts=128, prompt_tokens=64, new_tokens=128),
    }


# Limits of the hardware


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Time one call in seconds: the median of several after a warm-up."""
    taken = []
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])[repeats // 2]


def wait(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_limits(device: torch.device, tiny: bool) -> dict[str, float]:
    """Measure bytes per second of a copy (read and written) and operations per second of a bf16 product."""
    source = torch.ones(2**20 if tiny else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device, 10)
    n = 256 if tiny else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    product = seconds(lambda: a @ a, device, 10)
    return {"copy_bytes_per_second": 2 * source.numel() / copy, "bf16_flops_per_second": 2 * n**3 / product}


# What the algorithm needs


@dataclass(frozen=True)
class Needs:
    """Operations and bytes of one iteration, counted from the model's shape."""

    trunk: int
    """Weights in the products of the trunk, each used once per token."""
    head: int
    """Weights of the output layer, used once per response token."""
    attention_width: int
    """Layers x columns of the queries."""
    kv_bytes_per_token: int

    @classmethod
    def of(cls, model: nn.Module, config: Any) -> Needs:
        """Count those of a model."""
        matrices = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
        head = config.vocab_size * config.hidden_size
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        columns = config.hidden_size // config.num_attention_heads * kv_heads
        layers = config.num_hidden_layers
        trunk = sum(w.numel() for w in matrices) - head
        return cls(trunk, head, layers * config.hidden_size, 2 * 2 * layers * columns)

    def forward(self, case: Case) -> float:
        """Count the operations of one forward pass over all sequences of a rollout."""
        products = 2 * (self.trunk * case.tokens + self.head * case.new_tokens)
        return case.prompts * (products + 2 * self.attention_width * case.tokens**2)  # causal: half of 4 T^2

    def decoding_bytes(self, case: Case) -> float:
        """Count the bytes that decoding must read: weights in bf16, keys and values of all earlier tokens."""
        kept = case.prompts * (case.prompt_tokens + case.new_tokens / 2) * self.kv_bytes_per_token
        return case.new_tokens * (2 * (self.trunk + self.head) + kept)


# Measuring


def left_out(way: Way, device: torch.device) -> str | None:
    """Return why a way cannot be measured here, or None."""
    if way.cuda_only and device.type != "cuda":
        return "needs a CUDA GPU"
    if way.needs is not None and importlib.util.find_spec(way.needs) is None:
        return f"needs {way.needs}, which is not installed"
    return None


@contextmanager
def sharded_alone(device: torch.device, *, bf16: bool) -> Iterator[None]:
    """Shard the models made inside over a group of this process alone, which a run itself would not do."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    total = torch.full((4,), 3.0, device=device)
    dist.all_reduce(total)
    assert total.tolist() == [3.0] * 4, f"a sum over one process by {backend} changed the numbers"
    plan = Plan(make_sharding(hybrid=False, device=device, bf16=bf16), "", decoding="whole")
    original, setup.plan_sharding = setup.plan_sharding, lambda *_, **__: plan
    try:
        yield
    finally:
        setup.plan_sharding = original
        dist.destroy_process_group()


def measure(case: Case, way: Way, device: torch.device, limits: dict[str, float], iterations: int) -> dict[str, Any]:
    """Measure one way to run one model: iterations of PPOTrainer after two for warm-up."""
    work = Workload(
        layers=0,
        width=0,
        vocabulary=case.config.vocab_size,
        iterations=0,
        prompts=case.prompts,
        prompt_tokens=case.prompt_tokens,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(case.config)
    needs, prompts = Needs.of(model, case.config), make_prompts(work)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if way.sharded:
            stack.enter_context(sharded_alone(device, bf16=compute_in_bf16("bf16", device)))
        source: Any = model
        if "quantization" in way.settings:  # happens while loading
            source = f"{folder}/whole"
            model.bfloat16().save_pretrained(source)
            del model
        trainer = PPOTrainer(
            model=source,
            reward_funcs=lambda prompts, completions, **_: [float(len(set(text))) for text in completions],
            processing_class=make_tokenizer(work),
            peft_config=adapter() if way.lora else None,
            args=RLHFConfig(
                output_dir=f"{folder}/run",
                rollout_batch_size=case.prompts,
                max_new_tokens=case.new_tokens,
                stop_token_ids=(),
                num_epochs=case.epochs,
                num_minibatches=case.minibatches,
                learning_rate=1e-6,
                precision="bf16",
                device=str(device),
                # Decoded and trained log-probs of random weights differ by bf16's rounding; here only time counts.
                max_initial_log_ratio=10.0,
                quiet=True,
                **way.settings,
            ),
        )
        for _ in range(2):  # the first may compile, the second capture its graph
            trainer.step(trainer.rollout(prompts))
        trainer.fixed.stopwatch.take()
        started = time.perf_counter()
        for _ in range(iterations):
            trainer.step(trainer.rollout(prompts))
        wait(device)
        iteration = (time.perf_counter() - started) / iterations
        totals, peaks = trainer.fixed.stopwatch.take()
        phases = {name: total / iterations for name, total in totals.items()}
    generated = case.prompts * case.new_tokens
    update_flops = 3 * case.epochs * needs.forward(case)
    decoding_limit = needs.decoding_bytes(case) / limits["copy_bytes_per_second"]
    return {
        "iteration_seconds": iteration,
        "samples_per_second": case.prompts / iteration,
        "generated_tokens_per_second": generated / iteration,
        "decoding_tokens_per_second": generated / phases["generate"],
        "decoding_share_of_bandwidth_limit": decoding_limit / phases["generate"],
        "update_mfu": update_flops / phases["update"] / limits["bf16_flops_per_second"],
        # Decoding and the reference process every token once more each.
        "iteration_mfu": (update_flops + 2 * needs.forward(case)) / iteration / limits["bf16_flops_per_second"],
        "peak_gib": max(peaks.values()) / 2**30 if peaks else None,
        **{f"{name}_peak_gib": value / 2**30 for name, value in peaks.items()},
        **{f"{name}_seconds": value for name, value in phases.items()},
    }


def adapter() -> Any:
    """Return the settings of a LoRA adapter on all layers of the transformer."""
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


COLUMNS = {
    "s/iteration": ("iteration_seconds", "{:.3g}"),
    "generate s": ("generate_seconds", "{:.3g}"),
    "update s": ("update_seconds", "{:.3g}"),
    "samples/s": ("samples_per_second", "{:.1f}"),
    "generated tokens/s": ("generated_tokens_per_second", "{:.0f}"),
    "decoding tokens/s": ("decoding_tokens_per_second", "{:.0f}"),
    "of bandwidth limit": ("decoding_share_of_bandwidth_limit", "{:.1%}"),
    "update MFU": ("update_mfu", "{:.1%}"),
    "iteration MFU": ("iteration_mfu", "{:.1%}"),
    "generate GiB": ("generate_peak_gib", "{:.1f}"),
    "update GiB": ("update_peak_gib", "{:.1f}"),
}


def table_row(row: dict[str, Any]) -> str:
    """Return one line of the markdown table."""
    if row["outcome"] == "measured":
        cells = ["-" if row.get(key) is None else form.format(row[key]) for key, form in COLUMNS.values()]
    else:
        cells = [f"{row['outcome']}: {row['why']}", *[""] * (len(COLUMNS) - 1)]
    return "| " + " | ".join([row["model"], row["way"], *cells]) + " |"


def sentence(row: dict[str, Any]) -> str:
    """Return what was measured in one line."""
    known = [f"{form.format(row[key])} {title}" for title, (key, form) in COLUMNS.items() if row.get(key) is not None]
    return ", ".join(known)


def measured(model: str, case: Case, name: str, *given: Any) -> dict[str, Any]:
    """Return the row of a model and a way: its numbers, or why there are none."""
    row: dict[str, Any] = {"model": model, "way": name}
    device = given[0]
    if why := left_out(WAYS[name], device):
        return {**row, "outcome": "left out", "why": why}
    try:
        row |= {**measure(case, WAYS[name], *given), "outcome": "measured"}
        return {**row, "text": sentence(row)}
    except Exception as error:  # still measure the other rows
        return {**row, "outcome": "failed", "why": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the rows; return 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu together with --tiny")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights: only checks the code")
    parser.add_argument("--iterations", type=int, default=3, help="iterations that are timed")
    parser.add_argument("--ways", nargs="+", default=list(ENGINES), choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--models", nargs="+", help=f"some of {', '.join(map(repr, cases(tiny=False)))}")
    parser.add_argument("--jsonl", type=Path, help="append each row to this file as soon as it is measured")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA GPU, and torch finds none (--tiny --device cpu checks the code alone)")
        return 1
    known = cases(args.tiny)
    if unknown := set(args.models or ()) - known.keys():
        print(f"unknown models {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        return 2
    device = resolve_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    limits = measure_limits(device, args.tiny)
    print(
        f"{name}, torch {torch.__version__}: copies {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"bf16 products {limits['bf16_flops_per_second'] / 1e12:.1f} TFLOP/s\n"
    )
    header = ["model", "way", *COLUMNS]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    rows: list[dict[str, Any]] = []
    if args.jsonl is not None:
        args.jsonl.parent.mkdir(parents=True, exist_ok=True)
    for model in args.models or known:
        for way in args.ways:
            rows.append(measured(model, known[model], way, device, limits, args.iterations))
            print(table_row(rows[-1]), flush=True)
            if args.jsonl is not None:
                append_line(args.jsonl, {**rows[-1], "device": name, "torch": torch.__version__, **limits})
    return int(any(row["outcome"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
