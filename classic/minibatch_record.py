"""What an update's minibatches said, and the metrics computed from it once, after the last step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from classic.gradient_step import update_loss
from rlhf_ppo.core import Experience, PolicyOutput, PPOConfig, ppo_diagnostics


def largest_gap(new: PolicyOutput, old: Experience) -> float:
    """The largest |log(new/old)| of any decision, in nats."""
    return float((new.logprobs.detach() - old.logprobs).abs().masked_fill(~old.mask, 0.0).max())


class UpdateRecord:
    """Minibatches kept as tensors: those read and those stepped on."""

    def __init__(self) -> None:
        self._read: list[tuple[PolicyOutput, Experience]] = []
        self._taken: list[tuple[PolicyOutput, Experience]] = []
        self._norms: list[float] = []
        self._forgotten: list[tuple[PolicyOutput, Experience]] = []

    def saw(self, new: PolicyOutput, old: Experience) -> None:
        """A minibatch was read, before the step on it."""
        self._read.append((_detached(new), old))

    def forget(self) -> None:
        """The minibatch read last was not finite: it is in no average, unless there is none but it."""
        self._forgotten = [self._read.pop()]

    def stepped(self, gradient_norm: float) -> None:
        """A step was taken on the minibatch read last."""
        self._taken.append(self._read[-1])
        self._norms.append(gradient_norm)

    @torch.no_grad()
    def metrics(self, config: PPOConfig) -> dict[str, float]:
        """Averages over every decision of every minibatch read (policy/...) and of every step taken (losses, norm)."""
        read = self._read or self._forgotten
        new, old = _joined(read)
        metrics = {f"policy/{name}": float(value) for name, value in ppo_diagnostics(new, old, config).items()}
        metrics["policy/first_minibatch_max_abs_log_ratio"] = largest_gap(*read[0])
        if self._taken:
            loss = update_loss(*((new, old) if len(self._taken) == len(read) else _joined(self._taken)), config)
            sizes = torch.stack([old.mask.sum() for _, old in self._taken]).tolist()
            norm = math.fsum(size * norm for size, norm in zip(sizes, self._norms, strict=True)) / sum(sizes)
            metrics |= {"policy/loss": float(loss.policy), "value/loss": float(loss.value), "optim/grad_norm": norm}
        return metrics


def _detached(new: PolicyOutput) -> PolicyOutput:
    values = None if new.values is None else new.values.detach()
    return PolicyOutput(new.logprobs.detach(), values, None if new.entropy is None else new.entropy.detach())


def _joined(parts: list[tuple[PolicyOutput, Experience]]) -> tuple[PolicyOutput, Experience]:
    """Minibatches as one."""

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
