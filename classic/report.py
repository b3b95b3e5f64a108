"""Reporting: the live numbers, the learning curve, and the thread count that small networks want."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from classic.envs import Episode
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


def episode_metrics(recent: Collection[Episode]) -> dict[str, float]:
    """Means over the last finished episodes; nothing before the first has finished."""
    if not recent:
        return {}
    return {
        "episode/return_mean": sum(episode.total_reward for episode in recent) / len(recent),
        "episode/length_mean": sum(episode.length for episode in recent) / len(recent),
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
