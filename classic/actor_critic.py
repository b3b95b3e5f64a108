"""Actor and critic: two separate tanh networks, and the distribution over actions that the actor describes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from rlhf_ppo.core import PolicyOutput

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def mlp(sizes: Sequence[int], output_gain: float, generator: torch.Generator) -> nn.Sequential:
    """Linear layers with tanh between them; orthogonal weights (gain sqrt 2, the last ``output_gain``), zero biases.

    Source: Andrychowicz et al., "What Matters in On-Policy RL" (2021): a small last policy layer starts the policy
    near uniform, whatever the observation.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        # skip_init: the default initialisation would draw from torch's global generator.
        layer = cast(nn.Linear, skip_init(nn.Linear, inputs, outputs))
        nn.init.orthogonal_(layer.weight, output_gain if last else math.sqrt(2), generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer] if last else [layer, nn.Tanh()]
    return nn.Sequential(*layers)


class ActorCritic(nn.Module):
    """A policy pi(a|s) and a critic V(s) without shared weights.

    Args:
        num_features: O, the length of an observation.
        num_actions: choices of a discrete action, or the length of a continuous one.
        continuous: a diagonal Gaussian whose log standard deviation is one learned number per action dimension,
            instead of a softmax over choices.
        hidden_sizes: widths of the hidden layers of either network.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        num_features: int,
        num_actions: int,
        *,
        continuous: bool,
        hidden_sizes: Sequence[int],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.continuous = continuous
        self.policy = mlp((num_features, *hidden_sizes, num_actions), 0.01, generator)
        self.critic = mlp((num_features, *hidden_sizes, 1), 1.0, generator)
        self.log_std = nn.Parameter(torch.zeros(num_actions)) if continuous else None

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Choose actions.

        Args:
            observations: [B, O].
            generator: draws from the policy; None takes the most likely action.
        Returns:
            (actions, logprobs): [B] int64 or [B, A] float, and [B] in nats.
        """
        output = self.policy(observations)
        if self.log_std is not None:
            noise = torch.zeros_like(output) if generator is None else torch.randn(output.shape, generator=generator)
            actions = output + self.log_std.exp() * noise
            return actions, self._gaussian_logprobs(output, actions)
        logprobs = output.log_softmax(dim=-1)
        scores = logprobs
        if generator is not None:
            # The Gumbel trick: log p minus the log of an exponential variable is largest with probability p.
            scores = logprobs - torch.empty_like(logprobs).exponential_(generator=generator).log()
        actions = scores.argmax(dim=-1)
        return actions, logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def evaluate(self, observations: Tensor, actions: Tensor) -> PolicyOutput:
        """Log-probs and entropy [N] of recorded actions and the critic's values [N], with gradients.

        Args:
            observations: [N, O].
            actions: [N] int64 or [N, A] float.
        """
        output = self.policy(observations)
        if self.log_std is not None:
            logprobs = self._gaussian_logprobs(output, actions)
            entropy = (self.log_std + LOG_SQRT_2PI + 0.5).sum().expand(len(output))
        else:
            log_p = output.log_softmax(dim=-1)
            logprobs = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            entropy = -(log_p.exp() * log_p).sum(dim=-1)
        return PolicyOutput(logprobs=logprobs, values=self.values(observations), entropy=entropy)

    def values(self, observations: Tensor) -> Tensor:
        """V(s): [N, O] -> [N]."""
        return self.critic(observations).squeeze(-1)

    def _gaussian_logprobs(self, mean: Tensor, actions: Tensor) -> Tensor:
        assert self.log_std is not None
        scaled = (actions - mean) * (-self.log_std).exp()
        return (-0.5 * scaled.square() - self.log_std - LOG_SQRT_2PI).sum(dim=-1)
