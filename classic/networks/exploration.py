"""Generalised state-dependent exploration (gSDE): noise that is a function of the state, and smooth for some steps.

Each action is its mean plus ``features @ matrix``, where the features are the policy's last hidden layer and the matrix
is drawn anew only every few steps. Over the draws, an action is Gaussian with the variance ``features**2 @ std**2``.

Source: Raffin, Kober and Stulp, "Smooth Exploration for Robotic Reinforcement Learning" (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from classic.networks.distributions import normal_noise

EPSILON = 1e-6
"""Added to the variance, as in Stable-Baselines3: all features may be 0."""


class ExploringHead(nn.Module):
    """The policy's layers, which return the actions' mean and, beside it, the features that scale exploration.

    The features get no gradient from the exploration: only the matrix' standard deviations are learned for it.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.hidden, self.mean = layers[:-1], layers[-1]

    def forward(self, x: Tensor) -> Tensor:
        features = self.hidden(x)
        return torch.cat([self.mean(features), features.detach()], dim=-1)


def exploration_log_std(features: Tensor, log_std: Tensor) -> Tensor:
    """Compute the log standard deviation of actions over the draws: [*, L], [L, A] -> [*, A]."""
    return 0.5 * torch.log(features.square() @ (2 * log_std).exp() + EPSILON)


def exploration_noise(shape: tuple[int, ...], size: torch.Size, every: int, generator: torch.Generator) -> Tensor:
    """Draw standard normal matrices [*shape, L, A], on axis 0 the same for ``every`` steps if there are two axes."""
    if len(shape) == 1:
        return normal_noise((*shape, *size), generator)
    steps, batch = shape
    drawn = normal_noise((-(-steps // every), batch, *size), generator)
    return drawn.repeat_interleave(every, dim=0)[:steps]


def explore(features: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
    """Compute what is added to the mean: [B, L], [L, A], [B, L, A] -> [B, A]."""
    return torch.einsum("bl,bla->ba", features, log_std.exp() * noise)
