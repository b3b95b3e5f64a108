"""Plot two parts of PPO: what the clip does to the objective, and what lambda does to the advantages.

What you will see: clip.png, the clipped objective and its gradient over the ratio for both signs of the advantage, and
lambda.png, the advantages of one episode under lambda 0, 0.95 and 1. Both come from the core's own functions.
How long: two seconds.

    python examples/clip_and_lambda.py [--output-dir runs/pictures]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from rlhf_ppo.core import clipped_policy_loss, compute_gae

CLIP_RANGE = 0.2
LAMBDAS = (0.0, 0.95, 1.0)


def objective(ratio: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    """Return the clipped objective (to be maximised) and its derivative by the ratio, both [N], at ratios [N]."""
    logprobs = ratio.log().requires_grad_()
    loss = clipped_policy_loss(
        logprobs, torch.zeros_like(ratio), torch.full_like(ratio, advantage), clip_range=CLIP_RANGE
    )
    (gradient,) = torch.autograd.grad(-loss.sum(), logprobs)
    return -loss.detach(), gradient / ratio  # d/dr = d/dlog r / r


def draw_clip(path: Path) -> None:
    """Draw one column for each sign of A: the objective above, its gradient below."""
    ratio = torch.linspace(0.4, 1.8, 1401)
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2, sharex=True)
    for column, advantage in enumerate((1.0, -1.0)):
        value, slope = objective(ratio, advantage)
        above, below = grid[0][column], grid[1][column]
        above.plot(ratio, advantage * ratio, linestyle="--", linewidth=1.2, color="grey", label="r A, not clipped")
        above.plot(ratio, value, linewidth=2, color="C0" if advantage > 0 else "C3", label="min(r A, clip(r) A)")
        above.set_title(f"A {'>' if advantage > 0 else '<'} 0: the action was {'good' if advantage > 0 else 'bad'}")
        above.legend(fontsize=8)
        below.plot(ratio, slope, linewidth=2, color="C0" if advantage > 0 else "C3")
        below.set_xlabel("ratio r = pi(a|s) / pi_old(a|s)")
        below.set_ylim(-1.3, 1.3)
        edge = 1 + CLIP_RANGE if advantage > 0 else 1 - CLIP_RANGE
        below.annotate(
            "no gradient:\nfar enough",
            (1.5 if advantage > 0 else 0.6, 0),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
        for axes in (above, below):
            axes.axvspan(1 - CLIP_RANGE, 1 + CLIP_RANGE, color="grey", alpha=0.12, linewidth=0)
            axes.axvline(edge, color="black", linewidth=0.8, linestyle=":")
            axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("objective")
    grid[1][0].set_ylabel("its derivative by r")
    figure.suptitle(f"The clip stops gains beyond 1 +- {CLIP_RANGE} (grey); it never stops a correction", fontsize=11)
    figure.savefig(path, dpi=130)


def advantages_of_one_episode() -> tuple[Tensor, dict[float, Tensor]]:
    """Return the values [T] of a partly wrong critic, and the advantages [T] under each lambda.

    24 steps, a reward of 1 only for the last, gamma 1: a perfect critic would predict the probability of success. This
    one predicts 0.5 until a good action at step 12, and success from there on.
    """
    steps = 24
    rewards = torch.zeros(1, steps)
    rewards[0, -1] = 1.0
    values = torch.full((1, steps), 0.5)
    values[0, 12:] = 0.9
    values += 0.05 * torch.randn(1, steps, generator=torch.Generator().manual_seed(0))
    terminated = torch.zeros(1, steps, dtype=torch.bool)
    terminated[0, -1] = True
    next_values = torch.cat([values[:, 1:], torch.zeros(1, 1)], dim=1)
    found = {}
    for gae_lambda in LAMBDAS:
        advantages, _ = compute_gae(
            rewards, values, next_values, terminated, torch.zeros_like(terminated), gamma=1.0, gae_lambda=gae_lambda
        )
        found[gae_lambda] = advantages[0]
    return values[0], found


def draw_lambda(path: Path) -> None:
    """Draw the critic's values above, the advantages under each lambda below."""
    values, advantages = advantages_of_one_episode()
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    above.plot(values, "o-", color="grey", markersize=3)
    above.set_ylabel("critic's V(s)")
    above.set_title("One episode of 24 steps; the only reward, 1, comes at the end (gamma 1)", fontsize=11)
    names = {0.0: "lambda 0: TD(0), one step", 0.95: "lambda 0.95", 1.0: "lambda 1: Monte Carlo, the whole future"}
    for gae_lambda, marker in zip(LAMBDAS, "os^", strict=True):
        below.plot(advantages[gae_lambda], f"{marker}-", markersize=4, linewidth=1.5, label=names[gae_lambda])
    below.axhline(0, color="black", linewidth=0.8)
    below.set(xlabel="step", ylabel="advantage")
    below.legend(fontsize=9)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description="Draw the clip and lambda.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/pictures"), help="folder for the two PNGs")
    folder = parser.parse_args(argv).output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for draw, name in ((draw_clip, "clip.png"), (draw_lambda, "lambda.png")):
        draw(folder / name)
        print(folder / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
