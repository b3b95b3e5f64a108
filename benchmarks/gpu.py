"""Time PPO iterations on one CUDA GPU against the hardware's limits: ``python benchmarks/gpu.py``.

What you will see: a table with a row for each model and engine, after about ten minutes. MFU counts the products that
the algorithm needs, relative to the measured rate of bf16 products; the decoding limit is the time to move weights
(bf16), keys and values once per decode step at the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from speed_workloads import Workload, make_prompts, make_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.runtime.device import resolve_device

ENGINES = ("dynamic", "static")


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
        gpt2 = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        return {"tiny GPT-2": Case(gpt2, prompts=4, prompt_tokens=4, new_tokens=6, epochs=1, minibatches=2)}
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


def measure(case: Case, engine: str, device: torch.device, limits: dict[str, float], iterations: int) -> dict[str, Any]:
    """Measure one engine on one model: iterations of PPOTrainer after two for warm-up."""
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
    prompts = make_prompts(work)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            model=model,
            reward_funcs=lambda prompts, completions, **_: [float(len(set(text))) for text in completions],
            processing_class=make_tokenizer(work),
            args=RLHFConfig(
                output_dir=folder,
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
                generation=engine,  # pyright: ignore[reportArgumentType] (one of ENGINES)
                quiet=True,
            ),
        )
        for _ in range(2):  # the first may compile, the second capture its graph
            trainer.step(trainer.rollout(prompts))
        trainer.fixed.stopwatch.take()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        for _ in range(iterations):
            trainer.step(trainer.rollout(prompts))
        wait(device)
        iteration = (time.perf_counter() - started) / iterations
        phases = {name: total / iterations for name, total in trainer.fixed.stopwatch.take().items()}
    needs = Needs.of(model, case.config)
    generated = case.prompts * case.new_tokens
    update_flops = 3 * case.epochs * needs.forward(case)
    decoding_limit = needs.decoding_bytes(case) / limits["copy_bytes_per_second"]
    return {
        "samples_per_second": case.prompts / iteration,
        "generated_tokens_per_second": generated / iteration,
        "decoding_tokens_per_second": generated / phases["generate"],
        "decoding_share_of_bandwidth_limit": decoding_limit / phases["generate"],
        "update_mfu": update_flops / phases["update"] / limits["bf16_flops_per_second"],
        # Decoding and the reference process every token once more each.
        "iteration_mfu": (update_flops + 2 * needs.forward(case)) / iteration / limits["bf16_flops_per_second"],
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        **{f"{name}_seconds": value for name, value in phases.items()},
    }


COLUMNS = {
    "samples/s": ("samples_per_second", "{:.1f}"),
    "generated tokens/s": ("generated_tokens_per_second", "{:.0f}"),
    "decoding tokens/s": ("decoding_tokens_per_second", "{:.0f}"),
    "of bandwidth limit": ("decoding_share_of_bandwidth_limit", "{:.1%}"),
    "update MFU": ("update_mfu", "{:.1%}"),
    "iteration MFU": ("iteration_mfu", "{:.1%}"),
    "peak GiB": ("peak_gib", "{:.1f}"),
}


def table_row(row: dict[str, Any]) -> str:
    """Return one line of the markdown table."""
    if "error" in row:
        cells = [f"failed: {row['error'].splitlines()[0]}", *[""] * (len(COLUMNS) - 1)]
    else:
        cells = ["-" if row[key] is None else form.format(row[key]) for key, form in COLUMNS.values()]
    return "| " + " | ".join([row["model"], row["generation"], *cells]) + " |"


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON; return 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu together with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights: only checks the code")
    parser.add_argument("--iterations", type=int, default=3, help="iterations that are timed")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--models", nargs="+", help=f"some of {', '.join(map(repr, cases(tiny=False)))}")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA GPU, and torch finds none (--tiny --device cpu checks the code alone)")
        return 1
    device = resolve_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    limits = measure_limits(device, args.tiny)
    print(
        f"{name}, torch {torch.__version__}: copies {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"bf16 products {limits['bf16_flops_per_second'] / 1e12:.1f} TFLOP/s\n"
    )
    header = ["model", "generation", *COLUMNS]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    rows: list[dict[str, Any]] = []
    for model, case in cases(args.tiny).items():
        for engine in args.engines if not args.models or model in args.models else ():
            row: dict[str, Any] = {"model": model, "generation": engine}
            try:
                row |= measure(case, engine, device, limits, args.iterations)
            except Exception as error:  # still measure the other rows
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
            print(table_row(row), flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if args.json is not None:
        result = {"device": name, "torch": torch.__version__, **limits, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2))
    return int(not rows or any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
