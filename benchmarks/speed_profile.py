"""Profile where a PPO iteration's time goes, by operator, like for like and with defaults.

Run:  python benchmarks/speed_profile.py --picture profile.png        (about two minutes on two CPU cores)
Prints and plots seconds by kind of work; "outside operators" is Python, scheduling and waiting.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from speed_worker import trainer_for
from speed_workloads import WORKLOADS, make_prompts
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product_flash",),
    "activation": ("aten::gelu",),
    "optimizer and gradient norm": ("aten::_fused_adam", "aten::linalg_vector_norm", "aten::_foreach_norm"),
    "softmax over the vocabulary": tuple(
        f"aten::{name}" for name in "exp sub amax sum div mul clamp gather scatter log".split()
    ),
    "layer norm, residuals": ("aten::native_layer_norm", "aten::add"),
    "copies and memory": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index", "aten::empty"),
}


def kind_of(operator: str) -> str:
    """Return the kind of work an operator does."""
    return next((kind for kind, names in KINDS.items() if operator.startswith(names)), "other operators")


def profile_iteration(workload: str, *, like: bool) -> tuple[dict[str, float], float]:
    """Return seconds by kind of work, longest first, and of the whole iteration."""
    work = WORKLOADS[workload]
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = trainer_for(work, folder, separate_critic=like, precision="fp32" if like else "auto")
        prompts = make_prompts(work)
        trainer.step(trainer.rollout(prompts))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            trainer.step(trainer.rollout(prompts))
            wall = time.perf_counter() - started
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    seconds["outside operators"] = max(wall - sum(seconds.values()), 0.0)
    return dict(seconds.most_common()), wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="M", choices=WORKLOADS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--picture", type=Path, default=None)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    sides = {
        name: profile_iteration(flags.workload, like=name == "like for like") for name in ("like for like", "defaults")
    }
    for name, (seconds, wall) in sides.items():
        for kind, value in seconds.items():
            print(f"| {name} | {kind} | {value:.2f} s | {value / wall:.0%} |")
    if flags.picture is not None:
        draw(sides, flags.workload, flags.picture)


def draw(sides: dict[str, tuple[dict[str, float], float]], workload: str, file: Path) -> None:
    """Draw one panel per side."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(sides), 1, figsize=(7, 3.0 * len(sides)), sharex=True)
    longest = max(value for seconds, _ in sides.values() for value in seconds.values())
    for axis, (name, (seconds, wall)) in zip(axes, sides.items(), strict=True):
        kinds, values = [*seconds][::-1], [*seconds.values()][::-1]
        bars = axis.barh(kinds, values, color="#4c72b0")
        axis.bar_label(bars, [f"{value:.2f} s, {value / wall:.0%}" for value in values], padding=4)
        axis.set_xlim(0, longest * 1.25)
        axis.set_title(f"{name}: {wall:.1f} s under the profiler", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(f"seconds of one iteration of workload {workload}")
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
