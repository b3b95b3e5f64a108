"""Acting: one step's choices for every copy, in numpy where that is a handful of rows through small layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from classic.fast.standard import is_plain
from classic.networks.actor_critic import ActorCritic
from classic.networks.layers import Tanh

Act = Callable[
    [Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    tuple[Tensor, Tensor, Tensor | None],
]
"""(observations, noise, action masks, starts, state) -> (the policy's outputs, actions, state after)."""

MAX_PRODUCT = 2**18
"""Rows x inputs x outputs up to which numpy's matrix product is quicker, and keeps to one thread by itself."""


def acting(network: ActorCritic, rows: int) -> Act:
    """How the network is asked for actions, ``rows`` at a time; valid until its weights change."""
    one_choice = len(network.actions.choices) == 1
    if not is_plain(network) or not (one_choice or (network.log_std is not None)):
        return _with_torch(network)
    bodies = list(network.bodies)
    layers: list[nn.Module] = [*(bodies[0].layers if bodies else ()), *network.policy]  # pyright: ignore
    if rows * max(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear)) > MAX_PRODUCT:
        return _with_torch(network)
    forward = numpy_forward(layers)
    std = None if network.log_std is None else network.log_std.detach().exp().numpy()

    def act(
        observations: Tensor, noise: Tensor, action_masks: Tensor | None, starts: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        output = forward(observations.numpy())
        if std is not None:
            return torch.from_numpy(output), torch.from_numpy(output + std * noise.numpy()), None
        allowed = output if action_masks is None else np.where(action_masks.numpy(), output, -np.inf)
        return torch.from_numpy(output), torch.from_numpy((allowed + noise.numpy()).argmax(axis=1)), None

    return act


def numpy_forward(layers: Iterable[nn.Module]) -> Callable[[np.ndarray], np.ndarray]:
    """Linear layers, tanh and relu as one function of arrays [B, I]; the weights are shared, not copied."""
    steps: list[tuple[np.ndarray, np.ndarray] | bool | None] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            steps.append((layer.weight.detach().numpy().T, layer.bias.detach().numpy()))
        else:
            steps.append(isinstance(layer, Tanh))

    def forward(x: np.ndarray) -> np.ndarray:
        for step in steps:
            if isinstance(step, tuple):
                x = x @ step[0]
                x += step[1]
            elif step:
                np.tanh(x, out=x)
            else:
                np.maximum(x, 0, out=x)
        return x

    return forward


def _with_torch(network: ActorCritic) -> Act:
    def act(
        observations: Tensor, noise: Tensor, action_masks: Tensor | None, starts: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        output, state = network.step(observations, starts, state)
        return output, network.choose(output, noise, action_masks), state

    return act
