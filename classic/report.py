"""Reporting: a line of metrics an update, the live numbers, the learning curve."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from classic.envs.environments import Episode
from classic.rollout import Estimate
from rlhf_ppo.core import explained_variance, masked_mean, masked_var
from rlhf_ppo.runtime.plots import plot_curves
from rlhf_ppo.runtime.progress import ProgressDisplay
from rlhf_ppo.runtime.run_directory import RunDirectory

PANELS = {
    "episode/return_mean": "return, last 100 episodes",
    "policy/approx_kl": "KL(old || new), nats per action",
    "policy/clip_fraction": "share of actions clipped",
    "policy/entropy": "entropy, nats per action",
    "value/explained_variance": "explained variance of returns",
}


def run_metrics(counters: Mapping[str, int], recent: Collection[Episode]) -> dict[str, float]:
    """How far a run is, and means over its last finished episodes; without those before the first has finished."""
    metrics: dict[str, float] = {
        "progress/iteration": counters["iteration"],
        "progress/env_steps": counters["env_steps"],
        "progress/optimizer_steps": counters["optimizer_steps"],
        "episode/count": counters["episodes"],
    }
    if recent:
        metrics["episode/return_mean"] = sum(episode.total_reward for episode in recent) / len(recent)
        metrics["episode/length_mean"] = sum(episode.length for episode in recent) / len(recent)
    return metrics


def estimate_metrics(estimate: Estimate, mask: Tensor) -> dict[str, float]:
    """What the critic made of a rollout, over its real decisions (mask [B, T])."""
    values, _, advantages, returns = estimate
    return {
        "value/explained_variance": float(explained_variance(values, returns, mask)),
        "value/mean": float(masked_mean(values, mask)),
        "value/return_mean": float(masked_mean(returns, mask)),
        "advantage/std": float(masked_var(advantages, mask).sqrt()),
    }


def show_progress(display: ProgressDisplay, done: int, metrics: Mapping[str, float]) -> None:
    """The few numbers that tell whether a run is healthy."""
    shown = {
        "return": "episode/return_mean",
        "kl": "policy/approx_kl",
        "clipped": "policy/clip_fraction",
        "explained": "value/explained_variance",
    }
    display.update(done, **{name: metrics[key] for name, key in shown.items() if key in metrics})


def draw_curve(run: RunDirectory, title: str) -> Path:
    """``curve.png`` from ``metrics.jsonl``."""
    return plot_curves(run.read(), run.path / "curve.png", x="progress/env_steps", panels=PANELS, title=title)
