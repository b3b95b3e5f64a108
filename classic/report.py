"""Report an update: its metrics, the live numbers, the learning curve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from classic.advantages import Estimate
from classic.config import PPOArgs
from classic.envs.environments import Episode
from classic.gradient_step import update_loss
from rlhf_ppo.core import (
    Experience,
    PolicyOutput,
    PPOConfig,
    explained_variance,
    masked_mean,
    masked_var,
    ppo_diagnostics,
)
from rlhf_ppo.runtime.logs.panel import AGENT, RunPanel
from rlhf_ppo.runtime.logs.progress import ProgressDisplay
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.plots import plot_at_end
from rlhf_ppo.runtime.report.curves import CLIP_FRACTION, CONTROL, panels

PANELS = panels((*CONTROL, CLIP_FRACTION))


def run_metrics(counters: Mapping[str, int], recent: Collection[Episode]) -> dict[str, float]:
    """Return the run's counters and means over its last finished episodes, if any have finished."""
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
    """Return statistics of values, returns and advantages over a rollout's unmasked steps (mask [B, T])."""
    return {
        "value/explained_variance": float(explained_variance(estimate.values, estimate.returns, mask)),
        "value/mean": float(masked_mean(estimate.values, mask)),
        "value/return_mean": float(masked_mean(estimate.returns, mask)),
        "advantage/std": float(masked_var(estimate.advantages, mask).sqrt()),
    }


def make_panel(args: PPOArgs) -> RunPanel:
    """Make what a terminal shows of a run."""
    return RunPanel(AGENT, dataclasses.asdict(args))


def show_progress(display: ProgressDisplay, done: int, metrics: Mapping[str, float]) -> None:
    """Show the few numbers that tell whether a run is healthy."""
    display.show(metrics)
    shown = {
        "return": "episode/return_mean",
        "kl": "policy/approx_kl",
        "clipped": "policy/clip_fraction",
        "explained": "value/explained_variance",
    }
    display.update(done, **{name: metrics[key] for name, key in shown.items() if key in metrics})


def draw_curve(run: RunDirectory, title: str) -> None:
    """Draw ``curve.png`` from ``metrics.jsonl``."""
    plot_at_end(run.read(), run.path / "curve.png", x="progress/env_steps", panels=PANELS, title=title)


def largest_gap(new: PolicyOutput, old: Experience) -> float:
    """Return the largest |log(new/old)| of any unmasked decision, in nats."""
    return float((new.logprobs.detach() - old.logprobs).abs().masked_fill(~old.mask, 0.0).max())


class UpdateRecord:
    """The minibatches of an update, kept as tensors until their metrics are computed once, after the last step."""

    def __init__(self) -> None:
        self._read: list[tuple[PolicyOutput, Experience]] = []
        self._taken: list[tuple[PolicyOutput, Experience]] = []
        self._norms: list[float] = []
        self._dropped: list[tuple[PolicyOutput, Experience]] = []

    def add(self, new: PolicyOutput, old: Experience) -> None:
        """Record a minibatch, before the optimizer step on it."""
        self._read.append((_detached(new), old))

    def drop(self) -> None:
        """Leave the last minibatch, a non-finite one, out of all averages; it counts only if there is no other."""
        self._dropped = [self._read.pop()]

    def stepped(self, gradient_norm: float) -> None:
        """Record the optimizer step on the last minibatch."""
        self._taken.append(self._read[-1])
        self._norms.append(gradient_norm)

    @torch.no_grad()
    def metrics(self, config: PPOConfig, value_std: float = 1.0) -> dict[str, float]:
        """Average policy/... over all decisions, losses and gradient norm over those with an optimizer step.

        The value loss is in the reward's units: ``value_std`` is the critic's unit in them.
        """
        read = self._read or self._dropped
        new, old = _joined(read)
        metrics = {f"policy/{name}": float(value) for name, value in ppo_diagnostics(new, old, config).items()}
        metrics["policy/first_minibatch_max_abs_log_ratio"] = largest_gap(*read[0])
        if self._taken:
            loss = update_loss(*((new, old) if len(self._taken) == len(read) else _joined(self._taken)), config)
            sizes = torch.stack([old.mask.sum() for _, old in self._taken]).tolist()
            norm = math.fsum(size * norm for size, norm in zip(sizes, self._norms, strict=True)) / sum(sizes)
            value = float(loss.value) * value_std**2
            metrics |= {"policy/loss": float(loss.policy), "value/loss": value, "optim/grad_norm": norm}
        return metrics


def _detached(new: PolicyOutput) -> PolicyOutput:
    values = None if new.values is None else new.values.detach()
    return PolicyOutput(new.logprobs.detach(), values, None if new.entropy is None else new.entropy.detach())


def _joined(parts: list[tuple[PolicyOutput, Experience]]) -> tuple[PolicyOutput, Experience]:
    """Concatenate minibatches."""

    def cat(tensors: list[Tensor | None]) -> Tensor | None:
        given = [x for x in tensors if x is not None]
        return torch.cat(given) if given else None

    news, olds = [new for new, _ in parts], [old for _, old in parts]
    new = PolicyOutput(
        torch.cat([new.logprobs for new in news]), cat([new.values for new in news]), cat([new.entropy for new in news])
    )
    old = Experience(
        logprobs=torch.cat([old.logprobs for old in olds]),
        values=cat([old.values for old in olds]),
        advantages=torch.cat([old.advantages for old in olds]),
        returns=cat([old.returns for old in olds]),
        mask=torch.cat([old.mask for old in olds]),
    )
    return new, old
