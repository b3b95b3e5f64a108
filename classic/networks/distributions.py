"""Distributions over actions: log-probs, entropies and samples of categoricals, Gaussians and squashed Gaussians."""

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
    """Split the logits of several choices, [*, sum(choices)] -> [*, len(choices), max(choices)].

    Options that a choice does not have are padded with -inf, which is probability 0.
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
    """Compute log p of the chosen options and the entropy, both [*] in nats; options at -inf have probability 0.

    Args:
        logits: [*, C].
        actions: [*] int64.
    """
    log_p = logits.log_softmax(dim=-1)
    chosen = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    # 0 * -inf is NaN, but an option of probability 0 adds nothing to the entropy.
    finite = log_p.masked_fill(log_p == -math.inf, 0.0)
    return chosen, -(log_p.exp() * finite).sum(dim=-1)


def gumbel_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw Gumbel noise: the argmax of logits + noise is a sample from their softmax.

    The underlying uniform numbers are drawn in order, so that drawing many steps at once equals drawing step by step.
    """
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float32).clamp_min_(
        torch.finfo(torch.float32).tiny
    )
    return uniform.log_().neg_().log_().neg_()


def normal_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw standard normal noise, in order like :func:`gumbel_noise`; torch.randn's order depends on the shape."""
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp_min_(torch.finfo(torch.float64).tiny)).float()


def sample_categorical(logits: Tensor, noise: Tensor | None) -> Tensor:
    """Sample options [*] int64 from logits [*, C] with :func:`gumbel_noise` of that shape; None: the most likely."""
    return (logits if noise is None else logits + noise).argmax(dim=-1)


def gaussian_logprobs(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """Compute log N(actions; mean, std) summed over the last axis: [*, A] -> [*] nats; log_std broadcasts."""
    scaled = (actions - mean) * (-log_std).exp()
    return (-0.5 * scaled.square() - log_std - LOG_SQRT_2PI).sum(dim=-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Compute the entropy of a Gaussian, [*, A] -> [*] nats."""
    return (log_std + LOG_SQRT_2PI + 0.5).sum(dim=-1)


def sample_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor | None) -> Tensor:
    """Sample [*, A] with :func:`normal_noise` of that shape; None: the mean."""
    return mean if noise is None else mean + log_std.exp() * noise


def log_tanh_slope(x: Tensor) -> Tensor:
    """Compute log(d tanh(x) / dx) = log(1 - tanh(x)^2), finite even where tanh rounds to 1.

    Source: the identity 1 - tanh^2 = 4 / (e^x + e^-x)^2.
    """
    return 2 * (LOG_2 - x - F.softplus(-2 * x))


def squashed_logprobs(mean: Tensor, log_std: Tensor, before: Tensor) -> Tensor:
    """Compute the log-density of tanh(before), where ``before`` is Gaussian: [*, A] -> [*] nats.

    Actions are recorded before tanh, which cannot be inverted where it rounds to 1.
    """
    return gaussian_logprobs(mean, log_std, before) - log_tanh_slope(before).sum(dim=-1)


def squashed_entropy(mean: Tensor, log_std: Tensor) -> Tensor:
    """Compute the entropy of tanh of a Gaussian, [*, A] -> [*] nats, with gradients: H(Gaussian) + E[log slope].

    There is no closed form; Gauss-Hermite quadrature with 32 nodes is within 1e-3 nats for standard deviations to 2.
    """
    nodes, weights = _hermite(32)
    x = mean.unsqueeze(-1) + log_std.exp().unsqueeze(-1) * nodes.to(mean.device)
    return gaussian_entropy(log_std.expand_as(mean)) + (log_tanh_slope(x) * weights.to(mean.device)).sum(dim=(-1, -2))


@cache
def _hermite(count: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(nodes, dtype=torch.float32), torch.tensor(weights / weights.sum(), dtype=torch.float32)
