"""Run the demo on several seeds: does the score rise beyond noise, and at what cost in KL and fluency?

Run:  python benchmarks/demo_seeds.py --seeds 5        (one to two minutes per seed and precision on an idle CPU core)
Prints, for each precision, one row per seed (the critic's explained variance is the mean over the run's second half)
and the mean over seeds with its 95 % interval (Student's t), and writes them as JSON. bf16 takes longer on a CPU
without bf16 instructions; --precision fp32 skips it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from rlhf_ppo.config.run_groups import Precision
from rlhf_ppo.pipeline.before_after import first_and_last_evaluation, paired_difference
from rlhf_ppo.pipeline.demo import DemoArgs, demo_trainer

STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
COLUMNS = {"score": "score", "kl_nats": "KL (nats/response)", "reference_nats_per_token": "surprise (nats/token)"}


def run_seed(seed: int, reward: str, precision: Precision, folder: str) -> dict[str, float]:
    started = time.perf_counter()
    trainer = demo_trainer(DemoArgs(reward=reward, output_dir=folder, seed=seed, precision=precision))
    trainer.train()
    before, after = first_and_last_evaluation(trainer.run)
    row: dict[str, float] = {"seed": seed, "minutes": (time.perf_counter() - started) / 60}
    for key in COLUMNS:
        firsts, lasts = [r[key] for r in before], [r[key] for r in after]
        row[f"{key}_before"], row[f"{key}_after"] = statistics.fmean(firsts), statistics.fmean(lasts)
        row[f"{key}_change"], row[f"{key}_half_width"] = paired_difference(firsts, lasts)
    updates = [line for line in trainer.run.read() if "value/explained_variance" in line]
    row["explained_variance"] = statistics.fmean(
        line["value/explained_variance"] for line in updates[len(updates) // 2 :]
    )
    return row


def show(rows: list[dict[str, float]], precision: str) -> None:
    """Print the table of one precision."""
    headings = " | ".join(f"{label}: before | after | change" for label in COLUMNS.values())
    print(f"\n| {precision}: seed | minutes | {headings} | explained variance |")
    print("|---" * (3 + 3 * len(COLUMNS)) + "|")
    for row in rows:
        cells = [
            f"{row[f'{key}_before']:.3f} | {row[f'{key}_after']:.3f} | {row[f'{key}_change']:+.3f} ± "
            f"{row[f'{key}_half_width']:.3f}"
            for key in COLUMNS
        ]
        print(f"| {row['seed']} | {row['minutes']:.1f} | {' | '.join(cells)} | {row['explained_variance']:.3f} |")
    for key, label in COLUMNS.items():
        changes = [row[f"{key}_change"] for row in rows]
        half = STUDENT_T[len(changes)] * statistics.stdev(changes) / len(changes) ** 0.5
        print(f"{label}: change {statistics.fmean(changes):+.3f} ± {half:.3f} over {len(changes)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 2 to 8")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--reward", default=DemoArgs.reward, help="reward of the demo")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows here")
    flags = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for precision in flags.precision:
        found[precision] = []
        for seed in range(flags.seeds):
            with tempfile.TemporaryDirectory() as folder:
                found[precision].append(run_seed(seed, flags.reward, precision, folder))
        show(found[precision], precision)
    if flags.json is not None:
        flags.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
