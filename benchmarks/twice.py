"""Train the same run twice on a device, and compare every byte: ``python benchmarks/twice.py --device cuda``.

What you will see: for the run as it comes, and under torch's deterministic algorithms, whether metrics and weights of
the two are equal; if not, where they first differ. About a minute on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it

import torch
from speed_workloads import Workload, make_prompts, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.runtime.logs.run_directory import append_line

WORK = Workload(layers=4, width=256, vocabulary=4096, iterations=3, prompts=32, prompt_tokens=16)
TINY = Workload(layers=2, width=16, vocabulary=64, iterations=2, prompts=4, prompt_tokens=4, new_tokens=6)


WAYS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    # Decoded without a captured graph, so that only the operators themselves are asked for.
    "deterministic algorithms": {"generation": "dynamic"},
}


def train(work: Workload, device: str, folder: Path, **settings: Any) -> None:
    """Train a model with random weights, always the same, for a few rollouts."""
    torch.manual_seed(0)
    sizes = {"n_embd": work.width, "n_layer": work.layers, "n_head": work.heads, "n_positions": 128}
    PPOTrainer(
        model=GPT2LMHeadModel(GPT2Config(vocab_size=work.vocabulary, bos_token_id=0, eos_token_id=0, **sizes)),
        reward_funcs=lambda prompts, completions, **_: [float(len(set(text))) for text in completions],
        processing_class=make_tokenizer(work),
        train_dataset=[{"prompt": prompt} for prompt in make_prompts(work)],
        args=RLHFConfig(
            output_dir=str(folder),
            total_episodes=work.prompts * work.iterations,
            rollout_batch_size=work.prompts,
            max_new_tokens=work.new_tokens,
            num_minibatches=work.minibatches,
            device=device,
            quiet=True,
            **settings,
        ),
    ).train()


def difference(one: Path, other: Path) -> str:
    """Return where two runs first differ; nothing if all metrics and weights are equal."""
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    for number, (a, b) in enumerate(zip(*(map(json.loads, rows) for rows in lines), strict=True), start=1):
        if names := [name for name in a if a[name] != b.get(name)]:
            at = f"rollout {number}, in {len(names)} of {len(a)} metrics"
            return f"{at}: {names[0]} {a[names[0]]!r} against {b.get(names[0])!r}"
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, other)]
    return "" if lines[0] == lines[1] and weights[0] == weights[1] else "the weights, after equal metrics"


def main(argv: list[str] | None = None) -> int:
    """Compare, and print one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights: only checks the code")
    parser.add_argument("--jsonl", type=Path, help="append each result to this file")
    args = parser.parse_args(argv)
    for way, settings in WAYS.items():
        torch.use_deterministic_algorithms(way != "as it comes")
        with tempfile.TemporaryDirectory() as folder:
            runs = [Path(folder) / name for name in ("first", "second")]
            for run in runs:
                train(TINY if args.tiny else WORK, args.device, run, **settings)
            differs = difference(*runs)
        text = f"differs from {differs}" if differs else "every byte of metrics and weights is equal"
        row: dict[str, Any] = {"run": way, "equal": not differs, "text": text}
        print(f"{way}: {text}", flush=True)
        if args.jsonl is not None:
            append_line(args.jsonl, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
