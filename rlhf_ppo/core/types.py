"""Records that the core passes around (policy output, experience, losses, banned tokens) and checks of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from rlhf_ppo.core.config import PPOConfig


@dataclass(frozen=True)
class PolicyOutput:
    """Output of the current policy for recorded actions; every field [*] carries gradients."""

    logprobs: Tensor
    """[*] log pi(a|s) of the recorded actions, in nats."""
    values: Tensor | None = None
    """[*] the critic's V(s), or None without a critic."""
    entropy: Tensor | None = None
    """[*] entropy of pi(.|s) in nats, or None when it is not needed."""
    kl: Tensor | None = None
    """[*] exact KL(pi(.|s) || reference) in nats, or None when it is not needed."""


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
    """[*] targets of the critic, on the scale of the rewards; None without a critic."""
    mask: Tensor
    """[*] bool, True where the policy made a real decision."""

    weights: Tensor | None = None
    """[*] importance weights of the sampled actions' losses, or None: 1 each."""
    ref_logprobs: Tensor | None = None
    """[*] log-probs under the frozen reference, or None when no loss needs them."""
    turns: Tensor | None = None
    """[*] long, the index of the turn that each action belongs to, or None when no ratio is pooled over turns."""
    sampled_logprobs: Tensor | None = None
    """[*] log-probs as the sampler recorded them, for objective dis, or None: ``logprobs`` are the sampler's."""
    positive: Tensor | None = None
    """[*] bool, True on the actions of positive examples, or None when no loss imitates them."""

    def compared_logprobs(self, config: PPOConfig) -> Tensor:
        """Return what the objective's ratio compares with: the old policy's log-probs, or under dis the sampler's."""
        return self.logprobs if self.sampled_logprobs is None or config.objective != "dis" else self.sampled_logprobs

    def __getitem__(self, rows: Tensor | list[int] | slice | tuple[slice, ...]) -> Experience:
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {name: None if x is None else x[rows] for name, x in whole.items()}
        return Experience(**taken)


@dataclass(frozen=True)
class PPOLoss:
    """Scalar losses of one minibatch; ``total`` is the one to minimise."""

    total: Tensor
    """policy + vf_coef * value - ent_coef * entropy + kl_loss_coef * kl + positive_loss_coef * positive."""
    policy: Tensor
    """The policy objective, negated."""
    value: Tensor
    """0.5 * squared error of the critic; 0 without one."""
    entropy: Tensor
    """Mean entropy in nats (a bonus, so larger is better); 0 when it was not computed."""
    kl: Tensor = field(default_factory=lambda: torch.zeros(()))
    """The KL to the reference as a loss term; 0 when kl_loss_coef is."""
    positive: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Negative log-likelihood of the positive examples; 0 when positive_loss_coef is."""


class BannedTokens(NamedTuple):
    """Tokens that cannot be sampled at some places: the other tokens share their probability."""

    where: Tensor
    """[*] bool, True where they are banned."""
    tokens: tuple[int, ...]
    """The banned ids."""


class Ban(BannedTokens):
    """BannedTokens under their earlier names."""

    def __new__(cls, rows: Tensor, tokens: tuple[int, ...]) -> Self:
        return super().__new__(cls, rows, tokens)

    @property
    def rows(self) -> Tensor:
        """[N] bool, True where they are banned."""
        return self.where


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


def require_temperature(temperature: float) -> None:
    """Raise a ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def require_token_ids(tokens: Tensor, vocabulary: int) -> None:
    """Raise a ValueError unless token ids are integers and, on CPU, in [0, vocabulary)."""
    if tokens.is_floating_point():
        raise ValueError(f"token ids must be integers, got {tokens.dtype}")
    # On a GPU this check would synchronise at every call.
    if (
        tokens.device.type == "cpu"
        and tokens.numel()
        and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary)
    ):
        raise ValueError(f"token ids must lie in [0, {vocabulary}), got {int(tokens.min())} to {int(tokens.max())}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 for bf16, fp16 and integers, otherwise the tensor's own."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def result_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of results: the input's, or float32 for integers and bool."""
    return x.dtype if x.is_floating_point() else torch.float32
