"""Measure score against KL: estimators (or any other arms) x kl_coef x seed on each task, a table and a picture.

Run:  python benchmarks/frontier.py --tasks sentiment no_e --seeds 0 1 2 3 4 --results build/frontier.jsonl
      python benchmarks/frontier.py --tasks sentiment --strengths 1 --arm full --arm "no clipping" clip_range_vf=None
      python benchmarks/frontier.py --table build/frontier.jsonl --picture frontier.png      (nothing is trained)
An arm is a name and the settings that differ from the defaults; without --arm these are PPO as it comes, RLOO and GRPO
with four responses per prompt. --strengths multiplies each task's unit of kl_coef (see critic_tasks.py). Each finished
run is a line of the results, and is not run again; several processes may fill one file if their tasks differ.

A frontier goes from the untrained policy (KL 0) through the points of one seed, straight lines between them over the
square root of the KL, along which scores rise about linearly (Gao et al., "Scaling Laws for Reward Model
Overoptimization", 2022). The gap between two frontiers is the area between them from 0 to the largest KL that both
reach, divided by its width: in units of the score. Gaps are paired by seed; they come with Student's t interval over
seeds and with a bootstrap over seeds, which is too narrow at five.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from critic_tasks import TASKS, missing, read_setting, run_once
from demo_seeds import STUDENT_T

ARMS: dict[str, dict[str, Any]] = {
    "PPO": {},
    "RLOO": {"advantage_estimator": "rloo", "num_generations": 4},
    "GRPO": {"advantage_estimator": "grpo", "num_generations": 4},
}
Row = dict[str, Any]
Curve = tuple[np.ndarray, np.ndarray]
"""Square roots of KL from 0 up, and scores."""


def identity(row: Row) -> str:
    """Return what makes a line the same measurement as another."""
    keys = ("task", "arm", "settings", "seed", "episodes", "draws")
    return json.dumps([row[key] for key in keys], sort_keys=True)


def read_results(files: Iterable[Path]) -> list[Row]:
    """Read the lines of files that exist, each measurement once."""
    lines = [json.loads(line) for file in files if file.is_file() for line in file.read_text("utf-8").splitlines()]
    return list({identity(row): row for row in lines}.values())


def measure(flags: argparse.Namespace, arms: dict[str, dict[str, Any]]) -> list[str]:
    """Run every cell that the results lack, seed by seed, so that each arm has as many as the others; return errors."""
    errors = []
    for seed in flags.seeds:
        for task in flags.tasks:
            for strength in flags.strengths:
                for arm, settings in arms.items():
                    cell = {**dict(flags.set), "kl_coef": strength * TASKS[task].kl_coef, **settings}
                    row = {"task": task, "arm": arm, "settings": cell, "seed": seed}
                    # As JSON has it: tuples are lists there.
                    row = json.loads(json.dumps({**row, "episodes": flags.episodes, "draws": flags.draws}))
                    if identity(row) in {identity(found) for found in read_results([flags.results])}:
                        continue
                    try:
                        with tempfile.TemporaryDirectory() as folder:
                            found = run_once(task, seed, flags.episodes, folder, draws=flags.draws, **cell)
                    except RuntimeError as error:  # a run that fell apart: the others go on
                        errors.append(f"{task}, {arm}, kl_coef={cell['kl_coef']:g}, seed {seed}: {error}")
                        continue
                    with flags.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**found, **row}) + "\n")
                    print(
                        f"{task} {arm} kl_coef={cell['kl_coef']:g} seed {seed}: score {found['score']:.3f} at "
                        f"{found['kl']:.2f} nats, {found['cpu_seconds']:.0f} CPU seconds",
                        file=sys.stderr,
                    )
    return errors


def curve(rows: Sequence[Row]) -> Curve:
    """Return the frontier of one task, arm and seed."""
    points = sorted((max(row["kl"], 0.0) ** 0.5, row["score"]) for row in rows)
    start = statistics.fmean(row["score_before"] for row in rows)
    return np.array([0.0, *(x for x, _ in points)]), np.array([start, *(y for _, y in points)])


def gap(ours: Curve, theirs: Curve) -> tuple[float, float, float]:
    """Return the mean height of ours above theirs, that of ours above its start, and the largest common KL."""
    end = min(ours[0][-1], theirs[0][-1])
    x = np.linspace(0, end, 401)
    # Both lie on x's even grid, so that the trapezoid rule's area over its width is this mean.
    weights = np.r_[0.5, np.ones(399), 0.5] / 400
    above = np.interp(x, *ours) - np.interp(x, *theirs)
    rise = np.interp(x, *ours) - ours[1][0]
    return float(weights @ above), float(weights @ rise), float(end**2)


def half_width(values: Sequence[float]) -> float:
    """Return the half-width of Student's t 95 % interval of the mean (NaN for one value)."""
    n = len(values)
    return STUDENT_T.get(n, 2.31) * statistics.stdev(values) / n**0.5 if n > 1 else float("nan")


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % quantiles of the mean over 10,000 resamples of the values."""
    draws = np.random.default_rng(0).choice(np.array(values), (10_000, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def frontiers(rows: Sequence[Row]) -> dict[str, dict[str, dict[int, list[Row]]]]:
    """Group rows: task -> arm -> seed -> its points, tasks and arms in the order of the file."""
    found: dict[str, dict[str, dict[int, list[Row]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        found[row["task"]][row["arm"]][row["seed"]].append(row)
    return found


def complete(seeds: dict[int, list[Row]]) -> dict[int, Curve]:
    """Return the frontiers of the seeds that have as many points as any."""
    most = max(len(rows) for rows in seeds.values())
    return {seed: curve(rows) for seed, rows in sorted(seeds.items()) if len(rows) == most}


def compare(rows: Sequence[Row]) -> list[Row]:
    """Compare each task's first arm with its others, paired by seed."""
    table = []
    for task, arms in frontiers(rows).items():
        first, *others = arms
        ours = complete(arms[first])
        for other in others:
            theirs = complete(arms[other])
            seeds = sorted(ours.keys() & theirs.keys())
            if not seeds:
                continue
            found = [gap(ours[seed], theirs[seed]) for seed in seeds]
            gaps, rises, ends = zip(*found, strict=True)
            mean, half = statistics.fmean(gaps), half_width(gaps)
            table.append(
                {
                    "task": task,
                    "pair": f"{first} - {other}",
                    "seeds": len(seeds),
                    "kl": statistics.fmean(ends),
                    "gap": mean,
                    "half_width": half,
                    "bootstrap": bootstrap(gaps),
                    "share": mean / statistics.fmean(rises),
                    "verdict": "above" if mean - half > 0 else "below" if mean + half < 0 else "open",
                }
            )
    return table


def cell(values: Sequence[float | None]) -> str:
    """Format a mean over seeds with its interval; a dash where nothing was measured."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    return f"{statistics.fmean(numbers):.3f}" + (f" ± {half_width(numbers):.3f}" if len(numbers) > 1 else "")


def show(rows: Sequence[Row]) -> None:
    """Print both tables in Markdown."""
    print("| task | arm | kl_coef | seeds | score | KL, nats per response | explained variance, second half |")
    print("|---" * 7 + "|")
    points: dict[tuple[str, str, float], list[Row]] = defaultdict(list)
    for row in rows:
        points[row["task"], row["arm"], row["settings"]["kl_coef"]].append(row)
    for (task, arm, kl_coef), found in points.items():
        cells = [cell([row[key] for row in found]) for key in ("score", "kl", "explained_variance")]
        print(f"| {task} | {arm} | {kl_coef:g} | {len(found)} | " + " | ".join(cells) + " |")
    print("\n| task | frontiers | seeds | to KL | gap in score | bootstrap | of the rise | the first is |")
    print("|---" * 8 + "|")
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in compare(rows):
        verdicts[row["pair"]][row["verdict"]] += 1
        low, high = row["bootstrap"]
        print(
            f"| {row['task']} | {row['pair']} | {row['seeds']} | {row['kl']:.1f} | {row['gap']:+.4f} ± "
            f"{row['half_width']:.4f} | {low:+.4f} to {high:+.4f} | {row['share']:+.0%} | {row['verdict']} |"
        )
    for pair, found in verdicts.items():
        print(f"\n{pair}: " + ", ".join(f"{found[word]} {word}" for word in ("above", "open", "below")))


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw a panel for each task: seeds' points, the mean frontier of each arm, and the band of its t interval."""
    import matplotlib.pyplot as plt

    grouped = frontiers(rows)
    columns = min(3, len(grouped))
    lines = -(-len(grouped) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.5 * lines), squeeze=False)
    for axis in axes.flat[len(grouped) :]:
        axis.remove()
    for axis, (task, arms) in zip(axes.flat, grouped.items(), strict=False):
        for number, (arm, seeds) in enumerate(arms.items()):
            curves = list(complete(seeds).values())
            x = np.linspace(0, min(c[0][-1] for c in curves), 101)
            heights = np.array([np.interp(x, *c) for c in curves])
            color = f"C{number}"
            axis.plot(x, heights.mean(axis=0), color=color, label=arm)
            if len(curves) > 1:
                half = np.array([half_width(list(column)) for column in heights.T])
                axis.fill_between(x, heights.mean(axis=0) - half, heights.mean(axis=0) + half, color=color, alpha=0.15)
            for c in curves:
                axis.scatter(c[0][1:], c[1][1:], s=10, color=color, alpha=0.6, linewidths=0)
        heights = [row["score"] for found in arms.values() for rows in found.values() for row in rows]
        heights += [rows[0]["score_before"] for found in arms.values() for rows in found.values()]
        margin = 0.1 * (max(heights) - min(heights))  # bands of few seeds may be far wider
        axis.set_ylim(min(heights) - margin, max(heights) + margin)
        axis.set_title(TASKS[task].says if task in TASKS else task, fontsize=9)
        ticks = [t for t in (0, 0.5, 1, 2, 4, 8, 16, 32, 64) if t**0.5 <= axis.get_xlim()[1]]
        axis.set_xticks([t**0.5 for t in ticks], [f"{t:g}" for t in ticks])
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("KL to the reference, nats per response")
        axis.set_ylabel("held-out score")
    axes.flat[0].legend(frameon=False, loc="upper left")
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def read_arms(given: Sequence[Sequence[str]] | None) -> dict[str, dict[str, Any]]:
    """Read ``--arm NAME [setting=value ...]``; without any, the three estimators."""
    return {name: dict(map(read_setting, settings)) for name, *settings in given} if given else ARMS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[task for task in TASKS if missing(task) is None])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1, 2, 4], help="times the task's kl_coef")
    parser.add_argument("--arm", nargs="+", action="append", default=None, metavar="NAME|SETTING=VALUE")
    parser.add_argument("--set", type=read_setting, action="append", default=[], metavar="NAME=VALUE", help="every arm")
    parser.add_argument("--episodes", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=3, help="responses to each held-out prompt")
    parser.add_argument("--results", type=Path, default=Path("build/frontier.jsonl"))
    parser.add_argument("--table", type=Path, nargs="+", default=None, help="only show what these files hold")
    parser.add_argument("--picture", type=Path, default=None)
    flags = parser.parse_args()
    errors: list[str] = []
    if flags.table is None:
        if reasons := [reason for reason in map(missing, flags.tasks) if reason is not None]:
            parser.error("; ".join(reasons))
        flags.results.parent.mkdir(parents=True, exist_ok=True)
        errors = measure(flags, read_arms(flags.arm))
    rows = read_results(flags.table or [flags.results])
    if not rows:
        raise SystemExit(f"no results in {', '.join(map(str, flags.table or [flags.results]))}")
    show(rows)
    if flags.picture is not None:
        draw(rows, flags.picture)
    if errors:
        raise SystemExit("runs that fell apart:\n" + "\n".join(errors))


if __name__ == "__main__":
    main()
