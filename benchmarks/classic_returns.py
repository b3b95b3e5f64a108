"""Compare each preset's returns over seeds with published results. Resumable: finished runs are not repeated.

python benchmarks/classic_returns.py [--envs Acrobot-v1 Pendulum-v1] [--seeds 5] [--sb3-seeds 1] [--minutes 40]
    [--folder runs/returns] [--picture docs/images/returns.png]

Every run trains with its preset; the final policy is evaluated with deterministic actions. It goes seed by
seed over all environments, so that if you stop it early, or with --minutes, you still get a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from classic_speed import sb3_python

import classic
from classic.compare import RESULT, Variant, compare, draw_learning_curve
from rlhf_ppo.runtime.statistics import bootstrap_iqm, mean_and_error

# Published results (mean +- spread as given there), with their source.
PUBLISHED = {
    "CartPole-v1": "500 +- 0 (RL Zoo, 100k); 490.0 +- 6.1 (CleanRL, 500k)",
    "Acrobot-v1": "-73.5 +- 18.2 (RL Zoo, 1M); -86.4 +- 1.3 (CleanRL)",
    "MountainCar-v0": "-110.4 +- 19.5 (RL Zoo, 1M); -200 (CleanRL)",
    "Pendulum-v1": "-172 +- 104 (RL Zoo, 100k)",
    "CartPoleNoVel-v1": ">= 450 (sb3-contrib's test, 50k)",
    "LunarLander-v3": "242 +- 32 (RL Zoo, v2, 1M)",
    "LunarLanderContinuous-v3": "271 +- 32 (RL Zoo, v2, 1M)",
    "InvertedPendulum-v5": "",
    "HalfCheetah-v5": "5819 +- 664 (RL Zoo, v3); 5784 +- 1244 (Tianshou); 1443 +- 46 (CleanRL, v4)",
    "Hopper-v5": "2410 +- 10 (RL Zoo, v3); 2609 +- 701 (Tianshou); 2383 +- 272 (CleanRL, v4)",
    "Walker2d-v5": "3479 +- 822 (RL Zoo, v3); 3589 +- 757 (Tianshou); 2288 +- 572 (CleanRL, v4)",
    "BipedalWalker-v3": "213 +- 129 (RL Zoo, 5M)",
}


# Published results here are for another version of the environment, so Stable-Baselines3 can run beside ours.
OTHER_VERSIONS = ("LunarLander-v3", "LunarLanderContinuous-v3", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")


def row(env_id: str, variant: Variant, sb3: list[float]) -> str:
    """Return one line of the table."""
    middle, low, high = bootstrap_iqm([variant.returns])
    cells = [
        env_id,
        f"{variant.env_steps:,}",
        str(len(variant.returns)),
        mean_and_error(variant.returns),
        f"{middle:.1f} [{low:.1f}, {high:.1f}]",
        f"{variant.returns.min():.1f} to {variant.returns.max():.1f}",
        f"{mean_and_error(np.array(sb3))} ({len(sb3)})" if sb3 else "",
        PUBLISHED[env_id],
    ]
    return "| " + " | ".join(cells) + " |"


def missing(folder: Path, seeds: int) -> bool:
    """Tell whether a run of the first ``seeds`` is not finished."""
    return not all((folder / f"seed{seed}" / RESULT).is_file() for seed in range(seeds))


def sb3_return(env_id: str, seed: int, episodes: int, result: Path) -> float:
    """Return Stable-Baselines3's return with the RL Zoo's preset, run in its own environment unless finished."""
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        worker = Path(__file__).with_name("sb3_returns.py")
        command = [sb3_python(), worker, env_id, str(seed), str(episodes), result]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""})
    return json.loads(result.read_text(encoding="utf-8"))["mean_return"]


def draw_all(variants: dict[str, Variant], path: Path) -> None:
    """Draw learning curves, one panel per environment: IQM of the training return and its 95 % bootstrap band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(variants) // 4)
    figure = Figure(figsize=(13, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, 4, squeeze=False).flat)
    for axes, (env_id, variant) in zip(panels, variants.items(), strict=False):
        draw_learning_curve(axes, variant, "C0")
        axes.plot([variant.env_steps] * len(variant.returns), variant.returns, "o", color="C1", markersize=4)
        seeds = len(variant.returns)
        axes.set_title(f"{env_id}, {seeds} seed{'s' if seeds > 1 else ''}", fontsize=10)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 4))
        axes.grid(alpha=0.3)
    for axes in panels[len(variants) :]:
        axes.remove()
    figure.suptitle("Return of the last 100 episodes while training (IQM, 95 %); dots: the final policies", fontsize=11)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sb3-seeds", type=int, default=0, help="also Stable-Baselines3, where versions differ")
    parser.add_argument("--episodes", type=int, default=100, help="episodes of each evaluation")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this; 0: print only")
    parser.add_argument("--folder", type=Path, default=Path("runs/returns"))
    parser.add_argument("--picture", type=Path, default=None, help="draw the learning curves to this PNG")
    flags = parser.parse_args(argv)
    start, variants = time.monotonic(), {}
    sb3: dict[str, list[float]] = {env_id: [] for env_id in flags.envs}
    for seeds in range(1, max(flags.seeds, flags.sb3_seeds) + 1):
        for env_id in flags.envs:
            late = time.monotonic() - start > 60 * flags.minutes
            if seeds <= flags.seeds and not (late and missing(flags.folder / env_id / "as it is", seeds)):
                args = classic.PPOArgs(quiet=True)
                (variants[env_id],) = compare(
                    env_id, args, [{}], seeds=seeds, episodes=flags.episodes, folder=flags.folder / env_id
                )
            theirs = flags.folder / f"sb3-{env_id}-seed{seeds - 1}.json"
            if seeds <= flags.sb3_seeds and env_id in OTHER_VERSIONS and (theirs.exists() or not late):
                sb3[env_id].append(sb3_return(env_id, seeds - 1, flags.episodes, theirs))
            if env_id in variants:
                print(row(env_id, variants[env_id], sb3[env_id]), flush=True)
    head = [
        "environment",
        "env steps",
        "seeds",
        "mean +- standard error",
        "IQM [95 %]",
        "worst to best seed",
        "Stable-Baselines3 here (seeds)",
        "published",
    ]
    print("\n".join(["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]))
    for env_id, variant in variants.items():
        print(row(env_id, variant, sb3[env_id]))
    if flags.picture is not None:
        draw_all(variants, flags.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
