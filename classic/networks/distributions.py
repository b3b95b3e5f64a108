"""Distributions over actions as pure functions: log-probs, entropy and draws of choices, Gaussians, squashed ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
LOG_2 = math.log(2)


def split_choices(logits: Tensor, choices: tuple[int, ...]) -> Tensor:
    """Logits of several choices side by side, [*, sum(choices)] -> [*, len(choices), max(choices)].

    Options that a choice does not have get -inf, which is probability 0.
    """
    if len(set(choices)) == 1:
        return logits.unflatten(-1, (len(choices), choices[0]))
    index = torch.full((len(choices), max(choices)), sum(choices))
    first = 0
    for row, count in enumerate(choices):
        index[row, :count] = torch.arange(first, first + count)
        first += count
    return F.pad(logits, (0, 1), value=-math.inf)[..., index]


def categorical_logprobs(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the chosen options and the entropy, both [*] in nats; options at -inf have probability 0.

    Args:
        logits: [*, C].
        actions: [*] int64.
    """
    log_p = logits.log_softmax(dim=-1)
    chosen = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    # 0 * -inf is NaN: what cannot be chosen adds nothing to the entropy.
    finite = log_p.masked_fill(log_p == -math.inf, 0.0)
    return chosen, -(log_p.exp() * finite).sum(dim=-1)


def gumbel_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draws that make the largest of logits + noise a draw from their softmax, whatever the logits.

    The uniform numbers come one after another, so that many steps' draws at once are those of step after step.
    """
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float32).clamp_min_(
        torch.finfo(torch.float32).tiny
    )
    return uniform.log_().neg_().log_().neg_()


def normal_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal draws, one after another like :func:`gumbel_noise`'s; torch.randn's depend on the shape."""
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp_min_(torch.finfo(torch.float64).tiny)).float()


def sample_categorical(logits: Tensor, noise: Tensor | None) -> Tensor:
    """[*, C] -> [*] int64: a draw, given :func:`gumbel_noise` of that shape, or the most likely option without."""
    return (logits if noise is None else logits + noise).argmax(dim=-1)


def gaussian_logprobs(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """log N(actions; mean, std) summed over the last axis: [*, A] -> [*] nats; log_std broadcasts."""
    scaled = (actions - mean) * (-log_std).exp()
    return (-0.5 * scaled.square() - log_std - LOG_SQRT_2PI).sum(dim=-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """[*, A] -> [*] nats."""
    return (log_std + LOG_SQRT_2PI + 0.5).sum(dim=-1)


def sample_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor | None) -> Tensor:
    """A draw [*, A], given :func:`normal_noise` of that shape, or the mean without."""
    return mean if noise is None else mean + log_std.exp() * noise


def log_tanh_slope(x: Tensor) -> Tensor:
    """log(d tanh(x) / dx) = log(1 - tanh(x)^2), in a form that stays finite where tanh rounds to 1.

    Source: the identity 1 - tanh^2 = 4 / (e^x + e^-x)^2.
    """
    return 2 * (LOG_2 - x - F.softplus(-2 * x))


def squashed_logprobs(mean: Tensor, log_std: Tensor, before: Tensor) -> Tensor:
    """log-density of tanh(before), where ``before`` is Gaussian: [*, A] -> [*] nats.

    The action before tanh is what is recorded: tanh cannot be undone where it rounds to 1.
    """
    return gaussian_logprobs(mean, log_std, before) - log_tanh_slope(before).sum(dim=-1)


def squashed_entropy(mean: Tensor, log_std: Tensor) -> Tensor:
    """Entropy of tanh of a Gaussian, [*, A] -> [*] nats, with gradients: H(Gaussian) + E[log slope].

    There is no closed form; Gauss-Hermite quadrature with 32 nodes is within 1e-3 nats for standard deviations to 2.
    """
    nodes, weights = _hermite(32)
    x = mean.unsqueeze(-1) + log_std.exp().unsqueeze(-1) * nodes
    return gaussian_entropy(log_std.expand_as(mean)) + (log_tanh_slope(x) * weights).sum(dim=(-1, -2))


@cache
def _hermite(count: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(nodes, dtype=torch.float32), torch.tensor(weights / weights.sum(), dtype=torch.float32)
