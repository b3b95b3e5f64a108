"""Recognise the standard networks, which the shortcuts compute; every other network takes the plain way."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import nn

from classic.networks.actor_critic import ActorCritic
from classic.networks.layers import Body, Tanh

ACTIVATIONS = (Tanh, nn.ReLU)
KNOWN = (ActorCritic, Body, nn.ModuleList, nn.Sequential, nn.Linear, *ACTIVATIONS)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_standard(network: nn.Module) -> bool:
    """Whether a network is, layer by layer, what :class:`ActorCritic` builds from linear layers, tanh and relu.

    Exactly that, and on the CPU: a subclass, a hook, a parametrization, a method replaced on one object, a shared or
    missing parameter or another order of layers computes something that no shortcut computes.
    """
    parts = list(network.modules())
    named = list(network.named_parameters(remove_duplicate=False))
    return (
        type(network) is ActorCritic
        and all(type(part) in KNOWN and not _is_changed(part) for part in parts)
        and all(type(parameter) is nn.Parameter for _, parameter in named)
        and all(parameter.device.type == "cpu" for _, parameter in named)
        and len(named) == len(list(network.parameters()))
        and _is_in_order(network)
    )


def trains_every_parameter(network: nn.Module) -> bool:
    """Whether no parameter is frozen, has a hook or another dtype than the rest."""
    parameters: list[Any] = list(network.parameters())
    return len({parameter.dtype for parameter in parameters}) == 1 and not any(
        not p.requires_grad or p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters
    )


def _is_changed(part: nn.Module) -> bool:
    """Whether an object has hooks, or attributes that replace its class's functions."""
    return any(getattr(part, name) for name in HOOKS) or not _functions(type(part)).isdisjoint(vars(part))


@cache
def _functions(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))


def _is_in_order(network: ActorCritic) -> bool:
    bodies = cast("list[Body]", list(network.bodies))
    if len(bodies) > 1 or any(body.image is not None or body.memory is not None for body in bodies):
        return False
    heads = [network.policy, network.critic] if bodies else [network.policy[-1:], network.critic[-1:]]
    trunks: Any = [body.layers for body in bodies] or [network.policy[:-1], network.critic[:-1]]
    outputs = network.actions.num_outputs * (2 if network.state_dependent_std else 1)
    if [_widths(head) for head in heads] != [[outputs], [1]]:
        return False
    kinds = {type(layer) for trunk in trunks for layer in trunk[1::2]}
    shapes = [_widths(trunk[::2]) for trunk in trunks]
    return bool(
        all(len(trunk) and len(trunk) % 2 == 0 for trunk in trunks)
        and len(kinds) == 1
        and kinds <= set(ACTIVATIONS)
        and None not in shapes
        and all(shape == shapes[0] for shape in shapes)
        and (network.log_std is None or network.log_std.shape == (network.actions.dimensions,))
    )


def _widths(layers: nn.Module) -> list[int] | None:
    """Return the widths of linear layers with a bias; None if one is something else."""
    listed: list[Any] = list(cast(nn.Sequential, layers))
    if any(type(x) is not nn.Linear or x.bias is None or not isinstance(x.weight, torch.Tensor) for x in listed):
        return None
    return [x.weight.shape[0] for x in listed]
