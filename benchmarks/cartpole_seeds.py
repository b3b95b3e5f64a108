"""Train CartPole-v1 on several seeds and print the final deterministic return, steps and seconds.

python benchmarks/cartpole_seeds.py [--seeds 0 1 2 3 4] [--picture docs/images/cartpole.png]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import classic
from rlhf_ppo.runtime.logs.run_directory import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Train and evaluate each seed with the preset; print one row per seed."""
    parser = argparse.ArgumentParser(description="CartPole-v1 with the preset over several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds to train")
    parser.add_argument("--total-timesteps", type=int, default=None, help="training steps (default: the preset's)")
    parser.add_argument("--picture", type=Path, default=None, help="draw the seeds' learning curves to this PNG")
    options = parser.parse_args(argv)

    curves: dict[int, list[dict[str, float]]] = {}
    finals: dict[int, float] = {}
    print(
        "| seed | mean return, 20 episodes | std | env steps | training seconds | steps/s |\n|---|---|---|---|---|---|"
    )
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            agent = classic.PPO("CartPole-v1", classic.PPOArgs(seed=seed, quiet=True, output_dir=folder))
            start = time.perf_counter()
            agent.learn(options.total_timesteps)
            seconds = time.perf_counter() - start
            curves[seed] = RunDirectory(folder).read()
        result = agent.evaluate(episodes=20)
        steps = agent.counters["env_steps"]
        finals[seed] = result["mean_return"]
        print(
            f"| {seed} | {result['mean_return']:.1f} | {result['std_return']:.1f} | {steps} | {seconds:.1f} | "
            f"{steps / seconds:.0f} |",
            flush=True,
        )
    solved = sum(final >= 475 for final in finals.values())
    print(f"\n{solved} of {len(options.seeds)} seeds reach a mean of 475")
    if options.picture:
        draw(curves, finals, options.picture)
    return 0


def draw(curves: dict[int, list[dict[str, float]]], finals: dict[int, float], path: Path) -> None:
    """Draw a line per seed (return of the last 100 training episodes by steps) and a dot for its final evaluation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for seed, rows in curves.items():
        points = [
            (row["progress/env_steps"], row["episode/return_mean"]) for row in rows if "episode/return_mean" in row
        ]
        (line,) = axes.plot(*zip(*points, strict=True), linewidth=1.6, label=f"seed {seed}")
        axes.plot(points[-1][0], finals[seed], "o", color=line.get_color(), clip_on=False)
    axes.axhline(475, color="grey", linewidth=1, linestyle="--")
    axes.annotate(
        "475: solved (dots: 20 deterministic episodes after training)",
        (0, 475),
        xytext=(2, 3),
        textcoords="offset points",
        fontsize=8,
        color="grey",
    )
    axes.set(xlabel="environment steps", ylabel="return of the last 100 training episodes", ylim=(0, 520))
    axes.set_title("CartPole-v1: lines, sampled actions while training; dots, the final policy", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    raise SystemExit(main())
