"""A tiny model learns to use a calculator: curves of examples/calculator.py over seeds.

Run:  python benchmarks/calculator.py --seeds 0 1 2 --picture docs/images/calculator.png
(about 20 s of CPU time for the fine-tuned model, which all seeds start from, and 13 s a seed). Prints right
answers and calls at the beginning and at the end. With --json FILE the curves are kept, and seeds that are in the file
are not run again; --engine vllm --vllm-url URL samples through a server.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rlhf_ppo import PPOTrainer

CURVES = {
    "score/mean": "right answers",
    "tools/calls_per_response": "calls of the calculator per question",
    "tools/malformed_fraction": "share of calls that cannot be read",
}
EXAMPLE = Path(__file__).parents[1] / "examples" / "calculator.py"


def load_example() -> Any:
    """Import the example."""
    spec = importlib.util.spec_from_file_location("calculator_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_seed(folder: Path, seed: int, **settings: Any) -> dict[str, list[float]]:
    """Train once, from the model in the folder, which is made first if there is none; return each curve."""
    example, curves = load_example(), {name: [] for name in CURVES}

    def note(_: PPOTrainer, metrics: dict[str, float]) -> None:
        for name, curve in curves.items():
            curve.append(metrics[name])

    example.main(["--output-dir", str(folder), "--seed", str(seed)], callbacks=[note], quiet=True, **settings)
    return curves


def draw(runs: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Plot each curve: a thin line per seed, and their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, label) in enumerate(CURVES.items(), 1):
        axes = figure.add_subplot(1, 3, place)
        for curves in runs.values():
            axes.plot(range(1, len(curves[name]) + 1), curves[name], color="tab:blue", alpha=0.35, linewidth=1)
        mean = [statistics.fmean(values) for values in zip(*(curves[name] for curves in runs.values()), strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, color="tab:blue", linewidth=2)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("rollouts of 64 conversations")
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file of curves to read and to add to")
    parser.add_argument("--picture", type=Path, help="picture of the curves to write")
    parser.add_argument("--folder", type=Path, help="folder of the fine-tuned model and the runs; kept")
    parser.add_argument("--engine", default="dynamic", help="generation: dynamic, or vllm")
    parser.add_argument("--vllm-url", help="address of the server, with --engine vllm")
    flags = parser.parse_args(argv)

    runs: dict[str, dict[str, list[float]]] = {}
    if flags.json is not None and flags.json.is_file():
        runs = {row["seed"]: row["curves"] for row in map(json.loads, flags.json.read_text().splitlines())}
    served = {} if flags.vllm_url is None else {"vllm_url": flags.vllm_url}
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.folder or Path(temporary)
        for seed in map(str, flags.seeds):
            if seed not in runs:
                runs[seed] = run_seed(folder, int(seed), generation=flags.engine, **served)
                if flags.json is not None:
                    with flags.json.open("a") as file:
                        file.write(json.dumps({"seed": seed, "engine": flags.engine, "curves": runs[seed]}) + "\n")
    for name, label in CURVES.items():
        first = statistics.fmean(curves[name][0] for curves in runs.values())
        last = statistics.fmean(x for curves in runs.values() for x in curves[name][-4:])
        print(f"{label}: {first:.2f} in the first rollout, {last:.2f} in the last four ({len(runs)} seeds)")
    if flags.picture is not None:
        draw(runs, flags.picture)


if __name__ == "__main__":
    main()
