"""Sample actions in numpy, which for a few rows and small layers costs less than one torch call after another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from classic.fast.standard_networks import is_standard
from classic.networks.actor_critic import ActorCritic
from classic.networks.layers import Tanh

MAX_PRODUCT = 2**18
"""Rows x inputs x outputs up to which numpy's matrix product is faster and stays on one thread."""


class NumpyPolicy:
    """A standard network's policy in numpy; it shares the network's weights, as long as these are changed in place."""

    @staticmethod
    def fits(network: ActorCritic, batch: int) -> bool:
        """Whether this samples what the network would, and faster."""
        one_choice = len(network.actions.choices) == 1
        if not is_standard(network) or not (one_choice or network.log_std is not None):
            return False
        return batch * max(x.weight.numel() for x in _layers(network) if isinstance(x, nn.Linear)) <= MAX_PRODUCT

    def __init__(self, network: ActorCritic) -> None:
        self._steps = [
            (x.weight.detach().numpy().T, x.bias.detach().numpy()) if isinstance(x, nn.Linear) else isinstance(x, Tanh)
            for x in _layers(network)
        ]
        self._log_std = None if network.log_std is None else network.log_std.detach()

    def sample(
        self,
        observations: Tensor,
        noise: Tensor | None,
        action_masks: Tensor | None = None,
        starts: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Do what :meth:`ActorCritic.sample` does."""
        assert noise is not None
        output = self._forward(observations.numpy())
        if self._log_std is not None:
            std = self._log_std.exp().numpy()
            return torch.from_numpy(output), torch.from_numpy(output + std * noise.numpy()), None
        allowed = output if action_masks is None else np.where(action_masks.numpy(), output, -np.inf)
        return torch.from_numpy(output), torch.from_numpy((allowed + noise.numpy()).argmax(axis=1)), None

    def _forward(self, x: np.ndarray) -> np.ndarray:
        for step in self._steps:
            if isinstance(step, tuple):
                x = x @ step[0]
                x += step[1]
            elif step:
                np.tanh(x, out=x)
            else:
                np.maximum(x, 0, out=x)
        return x


def _layers(network: ActorCritic) -> list[nn.Module]:
    """Return the layers that the policy's outputs pass through."""
    shared: list[nn.Module] = list(network.bodies[0].layers) if len(network.bodies) else []  # pyright: ignore
    return [*shared, *network.policy]
