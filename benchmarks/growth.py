"""Measure how an iteration grows: time by batch, response length and vocabulary, memory by vocabulary.

Run:  python benchmarks/growth.py --picture growth.png        (about five minutes on two CPU cores)
A GPT-2 of 4 layers x 128; one quantity varies at a time from 32 responses of 48 tokens and a vocabulary of 4096. Memory
is the output layer's on 2048 response tokens, forward and backward, beyond weights and their gradient (Linux).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from speed_worker import resident_bytes, trainer_for
from speed_workloads import WORKLOADS, Workload, make_prompts

BATCHES = (16, 32, 64, 128)
LENGTHS = (12, 24, 48, 96)
VOCABULARIES = (4096, 16384, 32768, 65536, 131072)
ROWS, WIDTH = 2048, 128
HEADS = ("linear_logprobs", "all logits", "linear_kl", "KL of all logits")


def seconds(work: Workload) -> float:
    """Return the faster of two iterations after an untimed one."""
    prompts = make_prompts(work)
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = trainer_for(work, folder, separate_critic=False, precision="fp32")
        times = []
        for _ in range(3):
            started = time.perf_counter()
            trainer.step(trainer.rollout(prompts))
            times.append(time.perf_counter() - started)
    return min(times[1:])


def head_memory(vocabulary: int, kind: str) -> float:
    """Return MiB beyond weights and gradients, measured in a new process."""
    command = [sys.executable, __file__, "--head", kind, "--vocabulary", str(vocabulary)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_head(vocabulary: int, kind: str) -> float:
    """Print what ``head_memory`` parses."""
    from rlhf_ppo.core import kl_from_logits, linear_kl, linear_logprobs, token_logprobs

    weight = torch.randn(vocabulary, WIDTH, requires_grad=True)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    tokens = torch.randint(0, vocabulary, (ROWS,))
    reference = (hidden.detach().clone(), weight.detach().clone())
    (torch.ones(8, 8, requires_grad=True) @ torch.ones(8, 8)).sum().backward()  # start threads, load libraries
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which a process inherits
    if kind == "linear_logprobs":
        result = linear_logprobs(hidden, weight, tokens)
        assert isinstance(result, torch.Tensor)
    elif kind == "linear_kl":
        result = linear_kl(hidden, weight, *reference)
    elif kind == "all logits":
        result = token_logprobs(torch.nn.functional.linear(hidden, weight), tokens)
    else:
        logits, ref_logits = (torch.nn.functional.linear(*pair) for pair in ((hidden, weight), reference))
        result = kl_from_logits(logits, ref_logits)
    result.sum().backward()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return (peak - before - weight.nbytes - hidden.nbytes) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument("--head", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, default=0, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.head is not None:
        print(measure_head(flags.vocabulary, flags.head))
        return
    torch.set_num_threads(flags.threads)
    base = WORKLOADS["S"]
    curves = {
        "responses": [(n, seconds(replace(base, prompts=n))) for n in BATCHES],
        "new tokens": [(n, seconds(replace(base, new_tokens=n))) for n in LENGTHS],
        "vocabulary": [(n, seconds(replace(base, vocabulary=n))) for n in VOCABULARIES],
    }
    memory = {kind: [(n, head_memory(n, kind)) for n in VOCABULARIES] for kind in HEADS}
    for name, points in curves.items():
        print(f"| {name} | " + " | ".join(f"{n}: {value:.2f} s" for n, value in points) + " |")
    for name, points in memory.items():
        print(f"| memory, {name} | " + " | ".join(f"{n}: {value:.0f} MiB" for n, value in points) + " |")
    if flags.picture is not None:
        draw(curves, memory, flags.picture)


def draw(curves: dict[str, list[tuple[int, float]]], memory: dict[str, list[tuple[int, float]]], file: Path) -> None:
    """Draw four panels side by side."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2))
    for axis, (name, points) in zip(axes, curves.items(), strict=False):
        axis.plot(*zip(*points, strict=True), marker="o")
        axis.set_xlabel(name)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("seconds per iteration")
    for name in HEADS[:2]:
        points = memory[name]
        axes[3].plot(*zip(*points, strict=True), marker="o", label=name)
    axes[3].set_xlabel("vocabulary")
    axes[3].set_ylabel("MiB beyond weights and gradients")
    axes[3].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[2:]:
        axis.set_xticks([0, 65536, 131072], ["0", "65k", "131k"])
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
