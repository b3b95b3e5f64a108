"""The three records that the core passes around: what a policy says now, what was recorded, what to minimise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyOutput:
    """What the current policy says about recorded actions; every field [*] carries gradients."""

    logprobs: Tensor
    """[*] log pi(a|s) of the recorded actions, in nats."""
    values: Tensor | None = None
    """[*] the critic's V(s), or None without a critic."""
    entropy: Tensor | None = None
    """[*] entropy of pi(.|s) in nats, or None when nobody needs it."""


@dataclass(frozen=True)
class Experience:
    """Recorded facts about actions, fixed during an update; ``experience[rows]`` indexes every field on axis 0."""

    logprobs: Tensor
    """[*] log-probs recorded at rollout (the old policy's)."""
    values: Tensor | None
    """[*] the critic's values at rollout, or None without a critic."""
    advantages: Tensor
    """[*] advantages, usually whitened."""
    returns: Tensor | None
    """[*] what the critic should predict, on the scale of the rewards; None without a critic."""
    mask: Tensor
    """[*] bool, True where the policy made a real decision."""

    def __getitem__(self, rows: Tensor | list[int] | slice | tuple[slice, ...]) -> Experience:
        return Experience(
            logprobs=self.logprobs[rows],
            values=None if self.values is None else self.values[rows],
            advantages=self.advantages[rows],
            returns=None if self.returns is None else self.returns[rows],
            mask=self.mask[rows],
        )


@dataclass(frozen=True)
class PPOLoss:
    """Scalar losses of one minibatch; ``total`` is the one to minimise."""

    total: Tensor
    """policy + vf_coef * value - ent_coef * entropy."""
    policy: Tensor
    """The policy objective, negated."""
    value: Tensor
    """0.5 * squared error of the critic; 0 without one."""
    entropy: Tensor
    """Mean entropy in nats (a bonus, so larger is better); 0 when it was not computed."""


def require_same_shape(**tensors: Tensor | None) -> None:
    """Raise a ValueError naming both shapes unless every given tensor has the shape of the first."""
    given = [(name, x) for name, x in tensors.items() if x is not None]
    first_name, first = given[0]
    for name, x in given[1:]:
        if x.shape != first.shape:
            raise ValueError(
                f"{name} {tuple(x.shape)} and {first_name} {tuple(first.shape)} must have the same shape; "
                "broadcasting them would pair values of different actions"
            )


def require_bool(**masks: Tensor) -> None:
    """Raise a ValueError unless every tensor is bool."""
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} must be a bool tensor, got {mask.dtype}; convert it with {name}.bool()")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: float32 for bf16, fp16 and integers, otherwise the tensor's own."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype to return: the input's, or float32 for integers and bool."""
    return x.dtype if x.is_floating_point() else torch.float32
