"""Measure what a second process brings: time per phase, memory and traffic of the same run on 1, 2, ... processes.

Run:  python benchmarks/processes.py --processes 1 2 --model M
Each run trains the same random GPT-2 (the sizes of benchmarks/speed.py), started by torchrun, one thread a process, in
turns: rollouts of 32 responses of 48 tokens, with the default epochs and minibatches. Medians are over the iterations
after the first. Memory is the largest resident set of any process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"S": (4, 128, 4096), "M": (6, 384, 50257), "L": (12, 768, 50257)}
"""Name -> layers, width, vocabulary."""


def train(size: str, folder: str, args: argparse.Namespace) -> None:
    """Train in this process, which may be one of several; the first prints its numbers as JSON."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from rlhf_ppo import PPOTrainer, RLHFConfig
    from rlhf_ppo.runtime.processes.join import join_processes

    layers, width, vocabulary = SIZES[size]
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=vocabulary, **ends))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "rlhf_ppo/assets/stories-gpt2", trust_remote_code=False)
    trainer = PPOTrainer(
        model,
        lambda prompts, completions, **columns: [float(len(text) % 7) for text in completions],
        RLHFConfig(
            output_dir=folder,
            total_episodes=32 * args.iterations,
            max_new_tokens=48,
            stop_token_ids=(0,),
            min_new_tokens=48,
            precision=args.precision,
            quiet=True,
        ),
        train_dataset=[{"prompt": "once upon a time there was a"}] * 32,
        processing_class=tokenizer,
    )
    trainer.train()
    processes = join_processes()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = processes.facts(lambda: kilobytes)
    if processes.first:
        print(
            json.dumps({"peak_mb": max(peaks) / 1024, "parameters": sum(p.numel() for p in trainer.model.parameters())})
        )


def measure(size: str, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Start a run on ``count`` processes and return its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        flags = ["--worker", folder, "--model", size, "--iterations", str(args.iterations)]
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*launch, __file__, *flags], env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=True
        )
        rows = [json.loads(line) for line in (Path(folder) / "timings.jsonl").read_text().splitlines()]
    phases = {name: statistics.median(row[name] for row in rows[1:]) for name in ("generate", "reference", "update")}
    exchanged = (rows[-1].get("exchanged_bytes", 0) - rows[0].get("exchanged_bytes", 0)) / (len(rows) - 1)
    return {**json.loads(done.stdout.splitlines()[-1]), **phases, "exchanged_mb": exchanged / 1e6}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", choices=SIZES, default="S")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        train(args.model, args.worker, args)
        return
    heads = ("processes", "generate, s", "reference, s", "update, s", "all, s", "speed-up", "peak MB", "MB exchanged")
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|", flush=True)
    alone = None
    for count in args.processes:
        found = measure(args.model, count, args)
        whole = found["generate"] + found["reference"] + found["update"]
        alone = whole if alone is None else alone
        print(
            f"| {count} | {found['generate']:.2f} | {found['reference']:.2f} | {found['update']:.2f} | {whole:.2f} | "
            f"{alone / whole:.2f}x | {found['peak_mb']:.0f} | {found['exchanged_mb']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
