"""Time PPO iterations side by side: this project, TRL 1.12.0 (the last with PPO), and the machine's floor.

Run:  python benchmarks/speed.py                    (about an hour on two CPU cores; --workloads S: three minutes)
The first run installs TRL into build/peer. Each side has its own process; they alternate, with the same models,
prompts, lengths, epochs and minibatches (speed_workloads.py):
like for like  fp32 and a separate critic, as in TRL;   defaults  this project as it comes: shared trunk,
precision="auto".   floor: the dense matrix products of the same iteration alone.
Prints a table of medians over all timed iterations, writes them as JSON and plots where the time goes.
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
from speed_workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
PINS = ("torch==2.13.0", "transformers==5.23.0", "trl==1.12.0", "pandas", "peft==0.21.0")
SIDES = {"peer": "TRL 1.12.0", "like": "like for like", "defaults": "defaults"}
PHASES = ("generate", "reference", "score", "update")


def run(python: str, side: str, workload: str, threads: int) -> dict[str, Any]:
    """Run one side in its own process."""
    command = [python, str(ROOT / "benchmarks/speed_worker.py"), side, workload, "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{side} {workload} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(workloads: list[str], rounds: int, threads: int, peer: str) -> dict[str, Any]:
    """Measure all sides of all workloads ``rounds`` times, alternating; return medians over all timed iterations."""
    results: dict[str, Any] = {}
    for workload in workloads:
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(rounds):
            for side in ("floor", "like", "peer", "defaults"):
                python = peer if side == "peer" else sys.executable
                runs.setdefault(side, []).append(run(python, side, workload, threads))
                print(f"{workload} {side}: {runs[side][-1]['seconds']}", file=sys.stderr)
        results[workload] = {side: merge(runs[side]) for side in SIDES}
        floors = [result["seconds"] for result in runs["floor"]]
        results[workload]["floor"] = {key: statistics.median(floor[key] for floor in floors) for key in floors[0]}
    return results


def merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the runs of one side."""
    seconds = [value for result in runs for value in result["seconds"]]
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "mean_tokens": statistics.fmean(result["mean_tokens"] for result in runs),
        "peak_above_static_mb": statistics.median(result["peak_above_static_bytes"] for result in runs) / 2**20,
        "static_mb": runs[0]["static_bytes"] / 2**20,
        "phases": {phase: statistics.fmean(r["phases"].get(phase, 0.0) for r in runs) for phase in PHASES},
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as a markdown table."""
    head = ["workload", "side", "s/iteration (range)", "speedup over TRL", "over its floor", "samples/s", "tokens/s"]
    head += ["peak memory above static, MB", "share of TRL's", *PHASES]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for workload, sides in results.items():
        peer = sides["peer"]
        for side, name in SIDES.items():
            row = sides[side]
            floor = sides["floor"]["defaults" if side == "defaults" else "like"]
            cells = [
                workload,
                name,
                f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})",
                f"{peer['seconds'] / row['seconds']:.2f}x",
                f"{row['seconds'] / floor:.2f}",
                f"{WORKLOADS[workload].prompts / row['seconds']:.1f}",
                f"{WORKLOADS[workload].prompts * row['mean_tokens'] / row['seconds']:.0f}",
                f"{row['peak_above_static_mb']:.0f}",
                f"{row['peak_above_static_mb'] / peer['peak_above_static_mb']:.2f}",
                *(f"{row['phases'][phase]:.0%}" for phase in PHASES),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        floors = sides["floor"]
        lines.append(
            f"| {workload} | floor | {floors['like']:.2f} like for like, {floors['defaults']:.2f} defaults |"
            + " |" * (len(head) - 3)
        )
    return "\n".join(lines)


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw stacked bars: seconds of each phase by side, with the floor as a line."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.2 * len(results), 3.6), squeeze=False)
    for axis, (workload, sides) in zip(axes[0], results.items(), strict=True):
        names = ["peer", "like", "defaults"]
        bottom = [0.0] * 3
        for phase in PHASES:
            heights = [sides[side]["phases"][phase] * sides[side]["seconds"] for side in names]
            axis.bar(["TRL", "like for\nlike", "defaults"], heights, bottom=bottom, label=phase, width=0.6)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        for i, side in enumerate(names):
            floor = sides["floor"]["defaults" if side == "defaults" else "like"]
            axis.hlines(floor, i - 0.4, i + 0.4, colors="black", linestyles="dashed", label="floor" if i == 0 else None)
        axis.set_title(workload)
        axis.set_ylabel("seconds per iteration" if workload == next(iter(results)) else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["S", "M", "L", "V", "R"], choices=["S", "M", "L", "V", "R"])
    parser.add_argument("--rounds", type=int, default=2, help="how often every side runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--peer-python", default=None, help="interpreter with trl 1.12.0; default: build/peer, made here"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers here")
    parser.add_argument("--picture", type=Path, default=None, help="also plot them here")
    flags = parser.parse_args()
    peer = flags.peer_python or str(peer_python("peer", *PINS))
    results = measure(flags.workloads, flags.rounds, flags.threads, peer)
    print(table(results))
    if flags.json is not None:
        flags.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if flags.picture is not None:
        draw(results, flags.picture)


if __name__ == "__main__":
    main()
