"""Time how long training takes to a held-out score at a bounded KL: this project beside TRL's PPO, GRPO and RLOO.

Run:  python benchmarks/time_to_score.py --results build/time-to-score.jsonl --picture time-to-score.png
      python benchmarks/time_to_score.py --table build/time-to-score.jsonl --level 0.7      (nothing is trained)
TRL 1.12.0, the last with PPO, and the newest TRL get an environment each (build/trl-<version>, made on first use).
All sides fine-tune the embedded GPT-2 on the demo's prompts toward positive_sentiment, with equal batches, minibatches,
epochs and lengths, fp32 for TRL, one thread, in turns. First, every side but "ours as it comes" is searched over the
same grid of learning rates and KL coefficients on a seed of its own, each run until it has reached the level; the
setting that does in the fewest CPU seconds (else the highest score within the KL) is then run in full on --seeds. Each
run is a line of the results and is not run again; the table shows the newest chosen setting, at any --level. A run has
reached the level at the first evaluation that has the score within the KL and is followed by another such one (or is
the last). Seconds are those of training alone, from the first rollout on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ppo import RLHFConfig
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.pipeline.demo import HELD_OUT, OPENINGS

ROOT = Path(__file__).resolve().parents[1]
LAST_WITH_PPO, NEWEST = "1.12.0", "1.16.0"
SIDES = {
    "ours_as_it_comes": ("ours, as it comes", None),
    "ours": ("ours, searched", None),
    "trl_ppo": (f"TRL {LAST_WITH_PPO} PPO", LAST_WITH_PPO),
    "trl_grpo": (f"TRL {NEWEST} GRPO", NEWEST),
    "trl_rloo": (f"TRL {NEWEST} RLOO", NEWEST),
}
"""Side -> what it is called, and TRL's version."""

LEARNING_RATES = (3e-5, 1e-4, 3e-4)
KL_COEFS = (0.02, 0.05, 0.1)
Row = dict[str, Any]


def trl_python(version: str) -> str:
    """Return the interpreter of the environment with that TRL, created on first use."""
    folder = ROOT / f"build/trl-{version}"
    interpreter = folder / "bin/python"
    if not (folder / ".ready").exists():
        print(f"installing trl {version} into {folder.relative_to(ROOT)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pins = ["torch==2.13.0", "transformers==5.23.0", f"trl=={version}", "pandas", "vaderSentiment==3.3.2"]
        pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *pins], check=True)
        (folder / ".ready").touch()
    return str(interpreter)


def run(
    side: str, setting: tuple[float | None, float | None], seed: int, flags: argparse.Namespace, *, search: bool
) -> Row:
    """Return the row of one run: from the results, or else run in a process of its own and added to them."""
    row: Row = {"side": side, "learning_rate": setting[0], "kl_coef": setting[1], "seed": seed}
    row |= {"episodes": flags.episodes, "every": flags.every, "draws": flags.draws}
    row["until"] = [flags.level, flags.kl] if search else None
    for found in read_results(flags.results):
        if all(found[key] == value for key, value in row.items()):
            return found
    ours = RLHFConfig(output_dir="unused")
    rows = [line["prompt"] for line in load_rows(OPENINGS)]
    spec = {
        **{key: value for key, value in row.items() if key != "side"},
        "model": str(ROOT / "rlhf_ppo/assets/stories-gpt2"),
        "prompts": rows[HELD_OUT:],
        "held_out": rows[:HELD_OUT],
        "batch": ours.rollout_batch_size,
        "minibatches": ours.num_minibatches,
        "epochs": 2,  # the demo's
        "new_tokens": ours.max_new_tokens,
    }
    version = SIDES[side][1]
    python = sys.executable if version is None else trl_python(version)
    command = [python, str(ROOT / "benchmarks/time_to_score_worker.py"), side, json.dumps(spec)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    row |= json.loads(done.stdout.strip().splitlines()[-1])
    with flags.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    episodes, cpu, _, score, kl = row["curve"][-1]
    print(
        f"{side} learning_rate={setting[0]} kl_coef={setting[1]} seed {seed}: {episodes} episodes in {cpu:.0f} CPU "
        f"seconds, score {score:.3f} at {kl:.2f} nats",
        file=sys.stderr,
    )
    return row


def read_results(file: Path) -> list[Row]:
    """Read the lines of a file; none if there is none."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def reached(row: Row, level: float, kl: float) -> tuple[int, float, float] | None:
    """Return episodes, CPU seconds and wall seconds at which a run has reached the level within the KL."""
    fits = [point[3] >= level and point[4] <= kl for point in row["curve"]]
    for point, fit, next_fits in zip(row["curve"], fits, [*fits[1:], True], strict=True):
        if fit and next_fits:
            return point[0], point[1], point[2]
    return None


def rank(row: Row, level: float, kl: float) -> tuple[float, float]:
    """Order runs of a search: CPU seconds to the level, then the highest score within the KL."""
    found = reached(row, level, kl)
    return (math.inf if found is None else found[1]), -max(point[3] for point in row["curve"] if point[4] <= kl)


def chosen(rows: Sequence[Row], flags: argparse.Namespace) -> dict[str, list[Row]]:
    """Return each side's full runs on --seeds under the setting that was chosen last."""
    wanted = {"episodes": flags.episodes, "every": flags.every, "draws": flags.draws, "until": None}
    full = [row for row in rows if row["seed"] in flags.seeds and all(row[key] == wanted[key] for key in wanted)]
    found = {}
    for side in flags.sides:
        if mine := [row for row in full if row["side"] == side]:
            setting = mine[-1]["learning_rate"], mine[-1]["kl_coef"]
            found[side] = [row for row in mine if (row["learning_rate"], row["kl_coef"]) == setting]
    return found


def measure(flags: argparse.Namespace) -> None:
    """Search every side, then run what it chose; sides take turns."""
    tried: dict[str, list[Row]] = {side: [] for side in flags.sides}
    for setting in itertools.product(LEARNING_RATES, KL_COEFS):
        for side in flags.sides:
            if side != "ours_as_it_comes":
                tried[side].append(run(side, setting, flags.search_seed, flags, search=True))
    for seed in flags.seeds:
        for side, rows in tried.items():
            setting = (None, None)
            if rows:
                first = min(rows, key=lambda row: rank(row, flags.level, flags.kl))
                setting = first["learning_rate"], first["kl_coef"]
            run(side, setting, seed, flags, search=False)


def show(runs: dict[str, list[Row]], flags: argparse.Namespace) -> None:
    """Print a row per side: medians over seeds; a run that never reached the level counts as longer than any."""
    print(f"\nheld-out score {flags.level:g} within {flags.kl:g} nats per response; medians over seeds")
    print("| side | learning rate | kl_coef | reached | episodes | CPU seconds | wall seconds | x episodes | x CPU |")
    print("|---" * 9 + "|")
    medians = {}
    for side, rows in runs.items():
        found = [reached(row, flags.level, flags.kl) for row in rows]
        medians[side] = [statistics.median(p[i] if p else math.inf for p in found) for i in range(3)]
    base = next(iter(medians.values()), [math.nan] * 3)
    for side, rows in runs.items():
        episodes, cpu, wall = medians[side]
        count = sum(reached(row, flags.level, flags.kl) is not None for row in rows)
        setting = [("default" if rows[0][key] is None else f"{rows[0][key]:g}") for key in ("learning_rate", "kl_coef")]
        last = [statistics.median(row["curve"][-1][i] for row in rows) for i in range(3)]
        ratios = [
            f"{value / ours:.1f}" if value < math.inf else f"> {end / ours:.1f}"
            for value, ours, end in ((episodes, base[0], last[0]), (cpu, base[1], last[1]))
        ]
        cells = [
            f"{value:.0f}" if value < math.inf else f"> {end:.0f}"
            for value, end in zip((episodes, cpu, wall), last, strict=True)
        ]
        print(f"| {SIDES[side][0]} | {' | '.join([*setting, f'{count} of {len(rows)}', *cells, *ratios])} |")


def draw(runs: dict[str, list[Row]], flags: argparse.Namespace, file: Path) -> None:
    """Draw the mean score over episodes, over CPU seconds and over the KL, a line per side."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), sharey=True)
    for side, rows in runs.items():
        length = min(len(row["curve"]) for row in rows)
        mean = [
            [statistics.fmean(row["curve"][i][j] for row in rows) for i in range(length)]
            for j in range(len(rows[0]["curve"][0]))
        ]
        for axis, j in zip(axes, (0, 1, 4), strict=True):
            axis.plot(mean[j], mean[3], label=SIDES[side][0], linewidth=1.6)
    for axis, label in zip(axes, ("episodes", "CPU seconds of training", "KL, nats per response"), strict=True):
        axis.axhline(flags.level, color="gray", linestyle=":", linewidth=1)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].axvline(flags.kl, color="gray", linestyle=":", linewidth=1)
    axes[0].set_ylabel("held-out score")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--level", type=float, default=0.75, help="held-out score to reach")
    parser.add_argument("--kl", type=float, default=6.0, help="largest KL in nats per response")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--search-seed", type=int, default=100)
    parser.add_argument("--episodes", type=int, default=2048, help="of every run")
    parser.add_argument("--every", type=int, default=64, help="episodes between evaluations")
    parser.add_argument("--draws", type=int, default=2, help="responses to each held-out prompt")
    parser.add_argument("--results", type=Path, default=Path("build/time-to-score.jsonl"))
    parser.add_argument("--table", type=Path, default=None, help="only show what this file holds")
    parser.add_argument("--picture", type=Path, default=None)
    flags = parser.parse_args()
    if flags.table is None:
        flags.results.parent.mkdir(parents=True, exist_ok=True)
        measure(flags)
    runs = chosen(read_results(flags.table or flags.results), flags)
    show(runs, flags)
    if flags.picture is not None:
        draw(runs, flags, flags.picture)


if __name__ == "__main__":
    main()
