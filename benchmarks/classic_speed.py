"""Compare how long classic and Stable-Baselines3 take to reach the same return.

python benchmarks/classic_speed.py [--tasks CartPole-v1 Pendulum-v1 LunarLander-v3 HalfCheetah-v5] [--seeds 5]

Each side uses its own preset (Stable-Baselines3 the RL Zoo's) and its own single-threaded process, alternating. The
clock stops while the policy is evaluated: 20 deterministic episodes every 2,048 steps (CartPole). The first run
installs Stable-Baselines3 into build/sb3. HalfCheetah: the same settings on both sides, and a step's cost beyond the
environment's own. On a busy machine CPU seconds are more reliable.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from peers import peer_python

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("CartPole-v1", "Pendulum-v1", "LunarLander-v3")
CHEETAH = "HalfCheetah-v5"


def sb3_python() -> str:
    """Return the interpreter of Stable-Baselines3's environment, created on first use."""
    pins = ("torch==2.13.0", "stable-baselines3==2.9.2", "gymnasium[box2d,mujoco]==1.4.0")
    return str(peer_python("sb3", *pins))


def run(python: str, side: str, task: str, seed: int) -> dict[str, Any]:
    """Run one side in its own process."""
    command = [python, str(ROOT / "benchmarks/classic_speed_worker.py"), side, task, str(seed)]
    path = str(ROOT) if side == "ours" else ""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{side} {task} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{task} seed {seed} {side}: {result}", file=sys.stderr)
    return result


def to_the_return(task: str, sides: dict[str, list[dict[str, Any]]]) -> str:
    """Return the rows of a task: medians over the seeds, and SB3's relative to ours."""
    lines = []
    for side, name in (("ours", "classic"), ("sb3", "Stable-Baselines3 2.9.2")):
        results = sides[side]

        def median(key: str, results: list[dict[str, Any]] = results) -> float:
            return statistics.median(result[key] for result in results)

        rate = sum(result["env_steps"] for result in results) / sum(result["seconds"] for result in results)
        seconds = sorted(result["seconds"] for result in results)
        cells = [
            task,
            name,
            f"{sum(result['reached'] for result in results)} of {len(results)}",
            f"{median('seconds'):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})",
            f"{median('cpu_seconds'):.2f}",
            f"{median('env_steps'):,.0f}",
            f"{rate:,.0f}",
            f"{median('floor_seconds'):.2f}" if side == "ours" else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    ratios = [
        statistics.median(r[key] for r in sides["sb3"]) / statistics.median(r[key] for r in sides["ours"])
        for key in ("seconds", "cpu_seconds", "env_steps")
    ]
    cells = [task, "SB3 over classic", "", *(f"{ratio:.1f}x" for ratio in ratios), "", ""]
    return "\n".join([*lines, "| " + " | ".join(cells) + " |"])


def overhead(sides: dict[str, list[dict[str, Any]]]) -> str:
    """Print HalfCheetah's milliseconds per step beyond the environment's own."""
    ours, theirs = (
        {key: statistics.median(result[key] for result in sides[side]) for key in ("overhead", "overhead_cpu", "bare")}
        for side in ("ours", "sb3")
    )
    shares = [ours[key] / theirs[key] for key in ("overhead", "overhead_cpu")]
    return (
        f"{CHEETAH}, ms a step beyond bare stepping ({ours['bare']:.3f} ms): classic {ours['overhead']:.3f} (CPU "
        f"{ours['overhead_cpu']:.3f}), SB3 {theirs['overhead']:.3f} (CPU {theirs['overhead_cpu']:.3f}); "
        f"{shares[0]:.2f} of SB3's (CPU {shares[1]:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[*TASKS, CHEETAH], choices=[*TASKS, CHEETAH])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sb3-python", default=None, help="interpreter with stable-baselines3; default: build/sb3")
    parser.add_argument("--json", type=Path, default=None, help="also write every run here")
    flags = parser.parse_args()
    peer = flags.sb3_python or sb3_python()
    everything: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task in flags.tasks:
        sides: dict[str, list[dict[str, Any]]] = {"ours": [], "sb3": []}
        for seed in range(1, flags.seeds + 1):
            for side, python in (("ours", sys.executable), ("sb3", peer)):
                sides[side].append(run(python, side, task, seed))
        everything[task] = sides
        if flags.json is not None:
            flags.json.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    head = [
        "task",
        "side",
        "seeds that reach it",
        "seconds (range)",
        "CPU seconds",
        "env steps",
        "env steps/s",
        "floor, s",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    print("\n".join([*lines, *(to_the_return(task, everything[task]) for task in flags.tasks if task != CHEETAH)]))
    if CHEETAH in everything:
        print("\n" + overhead(everything[CHEETAH]))


if __name__ == "__main__":
    main()
