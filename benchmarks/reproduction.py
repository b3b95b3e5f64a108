"""What the reproductions share: runs over seeds, kept in a file; a picture of the curves; a band that they must reach.

A reproduction is a function ``run(seed, folder) -> {"curve": [...], **numbers}``, where a curve's points are mappings
with an ``x``. Used by random_walks.py, overoptimization.py and kl_control.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"


class Band(NamedTuple):
    """What a number of every seed must lie within."""

    number: str
    low: float
    high: float

    def check(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Print the number over all seeds and whether each lies in the band; return it."""
        values = [row[self.number] for row in rows]
        inside = sum(self.low <= value <= self.high for value in values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(
            f"{self.number}: {statistics.fmean(values):.3f} ± {spread:.3f} (mean and standard deviation), "
            f"{inside} of {len(values)} seeds in [{self.low:g}, {self.high:g}]"
        )
        return inside == len(values)


def reproduce(
    says: str,
    name: str,
    run: Callable[[int, str], dict[str, Any]],
    picture: Callable[[Sequence[dict[str, Any]], Path], None],
    *bands: Band,
) -> None:
    """Run a reproduction's command; it ends with 1 if a seed lies outside a band.

    Args:
        says: its help.
        name: of its file of results.
        run, picture: of the reproduction.
        bands: what must hold of every seed.
    """
    parser = argparse.ArgumentParser(description=says, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.jsonl", help="seeds in it are not run again")
    parser.add_argument("--picture", type=Path, default=None, help="also draw the curves here")
    flags = parser.parse_args()
    rows = over_seeds(run, flags.seeds, flags.results)
    if flags.picture is not None:
        picture(rows, flags.picture)
    held = [band.check(rows) for band in bands]  # each is printed
    raise SystemExit(not all(held))


def over_seeds(run: Callable[[int, str], dict[str, Any]], seeds: Sequence[int], results: Path) -> list[dict[str, Any]]:
    """Run every seed that ``results`` does not have, and return the rows of all."""
    lines = results.read_text("utf-8").splitlines() if results.is_file() else []
    found = {row["seed"]: row for row in map(json.loads, lines)}
    for seed in seeds:
        if seed not in found:
            with tempfile.TemporaryDirectory() as folder:
                found[seed] = {"seed": seed, **run(seed, folder)}
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[seed]) + "\n")
            numbers = {name: x for name, x in found[seed].items() if name != "curve"}
            print(" ".join(f"{name}={x:.3f}" if isinstance(x, float) else f"{name}={x}" for name, x in numbers.items()))
    return [found[seed] for seed in seeds]


def draw(axis: Any, rows: Sequence[dict[str, Any]], y: str, label: str, color: str, *, x: str = "x") -> None:
    """Draw each seed's curve thinly, and their mean over the points that all have."""
    curves = [row["curve"] for row in rows]
    for curve in curves:
        axis.plot([point[x] for point in curve], [point[y] for point in curve], color=color, linewidth=0.7, alpha=0.35)
    points = list(zip(*curves, strict=False))
    middle = [[statistics.fmean(point[name] for point in group) for group in points] for name in (x, y)]
    axis.plot(*middle, color=color, linewidth=2, label=label)
