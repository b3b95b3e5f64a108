"""What the update's loop needs around it: minibatches gathered once an epoch, and numbers about all of its steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from classic.actor_critic import Decisions
from rlhf_ppo.core import Experience, PolicyOutput, PPOConfig, PPOLoss, minibatch_indices, ppo_diagnostics


def shuffled_minibatches(
    decisions: Decisions, old: Experience, num_minibatches: int, generator: torch.Generator
) -> Iterator[tuple[Decisions, Experience]]:
    """One epoch: every row once, in a fresh order, as parts of (decisions, old).

    The rollout is gathered as a whole; the parts are slices of that, which cost nothing.
    """
    parts = minibatch_indices(len(decisions), num_minibatches, generator=generator)
    order = torch.cat(parts)
    decisions, old = decisions[order], old[order]
    start = 0
    for part in parts:
        rows = slice(start, start := start + len(part))
        yield decisions[rows], old[rows]


class UpdateRecord:
    """What an update's steps did, kept as tensors; everything is computed once, after the last step."""

    def __init__(self) -> None:
        self._new: list[PolicyOutput] = []
        self._old: list[Experience] = []
        self._losses: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._useless = False  # the minibatch read last

    def saw(self, new: PolicyOutput, old: Experience) -> None:
        """A minibatch was read, before the step on it."""
        entropy = None if new.entropy is None else new.entropy.detach()
        self._new.append(PolicyOutput(new.logprobs.detach(), entropy=entropy))
        self._old.append(old)
        if self._useless:
            del self._new[-2], self._old[-2]
        self._useless = False

    def forget(self) -> None:
        """The minibatch read last was not finite: it is in no average, unless there is none but it."""
        if len(self._new) == 1:
            self._useless = True
        else:
            del self._new[-1], self._old[-1]

    def stepped(self, loss: PPOLoss, gradient_norm: Tensor, old: Experience) -> None:
        """A step was taken on a minibatch."""
        self._losses.append(torch.stack((loss.policy.detach(), loss.value.detach(), gradient_norm)))
        self._sizes.append(old.mask.sum())

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
        gaps = (self._new[0].logprobs - self._old[0].logprobs).abs()
        first_gap = gaps.masked_fill(~self._old[0].mask, 0.0).max()
        metrics["policy/first_minibatch_max_abs_log_ratio"] = float(first_gap)
        if self._losses:
            weights = torch.stack(self._sizes).float()
            means = (weights @ torch.stack(self._losses) / weights.sum()).tolist()
            metrics.update(zip(("policy/loss", "value/loss", "optim/grad_norm"), means, strict=True))
        return metrics
