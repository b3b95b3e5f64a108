"""What the update's loop needs around it: minibatches gathered once an epoch, and numbers about all of its steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_ppo.core import Experience, PolicyOutput, PPOConfig, PPOLoss, minibatch_indices, ppo_diagnostics


def shuffled_minibatches(
    observations: Tensor, actions: Tensor, old: Experience, num_minibatches: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Experience]]:
    """One epoch: every decision once, in a fresh order, as parts of (observations, actions, old).

    The rollout is gathered as a whole; the parts are slices of that, which cost nothing.
    """
    parts = minibatch_indices(len(actions), num_minibatches, generator=generator)
    order = torch.cat(parts)
    observations, actions, old = observations[order], actions[order], old[order]
    start = 0
    for part in parts:
        rows = slice(start, start := start + len(part))
        yield observations[rows], actions[rows], old[rows]


class UpdateRecord:
    """What an update's steps did, kept as tensors; everything is computed once, after the last step."""

    def __init__(self) -> None:
        self._new: list[PolicyOutput] = []
        self._old: list[Experience] = []
        self._losses: list[Tensor] = []
        self._rows: list[int] = []

    def saw(self, new: PolicyOutput, old: Experience) -> None:
        """A minibatch was read, before the step on it."""
        entropy = None if new.entropy is None else new.entropy.detach()
        self._new.append(PolicyOutput(new.logprobs.detach(), entropy=entropy))
        self._old.append(old)

    def stepped(self, loss: PPOLoss, gradient_norm: Tensor, rows: int) -> None:
        """A step was taken on ``rows`` decisions."""
        self._losses.append(torch.stack((loss.policy.detach(), loss.value.detach(), gradient_norm)))
        self._rows.append(rows)

    def metrics(self, config: PPOConfig) -> dict[str, float]:
        """Averages over every decision of every minibatch read (policy/...) and of every step taken (losses, norm)."""
        entropies = [new.entropy for new in self._new if new.entropy is not None]
        new = PolicyOutput(
            torch.cat([new.logprobs for new in self._new]), entropy=torch.cat(entropies) if entropies else None
        )
        old = Experience(
            logprobs=torch.cat([old.logprobs for old in self._old]),
            values=None,
            advantages=torch.cat([old.advantages for old in self._old]),
            returns=None,
            mask=torch.cat([old.mask for old in self._old]),
        )
        metrics = {f"policy/{name}": float(value) for name, value in ppo_diagnostics(new, old, config).items()}
        first_gap = (self._new[0].logprobs - self._old[0].logprobs).abs().max()
        metrics["policy/first_minibatch_max_abs_log_ratio"] = float(first_gap)
        if self._losses:
            weights = torch.tensor(self._rows, dtype=torch.float32)
            means = (weights @ torch.stack(self._losses) / weights.sum()).tolist()
            metrics.update(zip(("policy/loss", "value/loss", "optim/grad_norm"), means, strict=True))
        return metrics
