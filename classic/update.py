"""What the update's loop needs around it: minibatches gathered once an epoch, when to stop, what its steps did."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from classic.actor_critic import ActorCritic, Decisions
from classic.gradients import update_loss
from rlhf_ppo.core import (
    Experience,
    PolicyOutput,
    PPOConfig,
    adapt_clip_range,
    adapt_penalty_beta,
    kl_estimate,
    masked_mean,
    minibatch_indices,
    ppo_diagnostics,
)


def shuffled_minibatches(
    decisions: Decisions, old: Experience, num_minibatches: int, generator: torch.Generator
) -> Iterator[tuple[Decisions, Experience]]:
    """One epoch: every row once, in a fresh order, as parts of (decisions, old).

    The rollout is gathered as a whole; the parts are slices of that, which cost nothing.
    """
    parts = minibatch_indices(len(decisions), num_minibatches, generator=generator)
    order, sizes = torch.cat(parts), [part.shape[0] for part in parts]
    yield from zip(_parts(decisions, order, sizes), _parts(old, order, sizes), strict=True)


def _parts(record: Any, order: Tensor, sizes: list[int]) -> Iterator[Any]:
    """The rows of a record of tensors (some None) in an order, as one record for each size."""
    fields = vars(record)
    columns = [repeat(None) if x is None else x.index_select(0, order).split(sizes) for x in fields.values()]
    for _, *row in zip(sizes, *columns, strict=False):
        yield type(record)(**dict(zip(fields, row, strict=True)))


def went_too_far(new: PolicyOutput, old: Experience, config: PPOConfig) -> bool:
    """Whether the update ends before its step on this minibatch (target_kl)."""
    if config.stopping_kl is None:
        return False
    kl = kl_estimate(old.logprobs, new.logprobs.detach(), "k3")
    return float(masked_mean(kl, old.mask)) > config.stopping_kl


@torch.no_grad()
def adapted(config: PPOConfig, network: ActorCritic, decisions: Decisions, old: Experience) -> PPOConfig:
    """Once per update: beta or the clip range moved by the KL that the update brought about."""
    if (target := config.steering_kl) is None:
        return config
    kl = float(ppo_diagnostics(network.evaluate(decisions), old, config)["approx_kl"])
    if config.objective == "penalty":
        return replace(config, penalty_beta=adapt_penalty_beta(config.penalty_beta, kl, target=target))
    return replace(config, clip_range=adapt_clip_range(config.clip_range, kl, target=target))


class UpdateRecord:
    """What an update's minibatches said, kept as tensors; everything is computed once, after the last step."""

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
        first_new, first_old = read[0]
        gaps = (first_new.logprobs - first_old.logprobs).abs()
        metrics["policy/first_minibatch_max_abs_log_ratio"] = float(gaps.masked_fill(~first_old.mask, 0.0).max())
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
