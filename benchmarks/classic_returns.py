"""What each preset reaches, over seeds, beside the published results. Resumable: finished runs are read, not repeated.

python benchmarks/classic_returns.py [--envs Acrobot-v1 Pendulum-v1] [--seeds 5] [--minutes 40] [--folder runs/returns]

Every run trains with its preset and is evaluated at the end, by its final policy with deterministic actions. Seed by
seed over all environments, so that stopping it early, or --minutes, leaves a table of what there is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import classic
from classic.comparison import Variant, compare
from classic.statistics import bootstrap_iqm

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
    "BipedalWalker-v3": "",
}


def row(env_id: str, variant: Variant) -> str:
    """One line of the table."""
    n = len(variant.returns)
    middle, low, high = bootstrap_iqm([variant.returns])
    error = f" +- {variant.returns.std(ddof=1) / np.sqrt(n):.1f}" if n > 1 else ""
    worst_best = f"{variant.returns.min():.1f} to {variant.returns.max():.1f}"
    cells = [
        env_id,
        f"{variant.env_steps:,}",
        str(n),
        f"{variant.returns.mean():.1f}{error}",
        f"{middle:.1f} [{low:.1f}, {high:.1f}]",
        worst_best,
        PUBLISHED[env_id],
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not there yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=100, help="episodes of each evaluation")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this")
    parser.add_argument("--folder", type=Path, default=Path("runs/returns"))
    flags = parser.parse_args(argv)
    start, variants = time.monotonic(), {}
    for seeds in range(1, flags.seeds + 1):
        for env_id in flags.envs:
            if time.monotonic() - start > 60 * flags.minutes:
                break
            args = classic.PPOArgs(quiet=True)
            (variants[env_id],) = compare(
                env_id, args, [{}], seeds=seeds, episodes=flags.episodes, folder=flags.folder / env_id
            )
            print(row(env_id, variants[env_id]), flush=True)
    head = [
        "environment",
        "env steps",
        "seeds",
        "mean +- standard error",
        "IQM [95 %]",
        "worst to best seed",
        "published",
    ]
    print("\n".join(["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]))
    for env_id, variant in variants.items():
        print(row(env_id, variant))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
