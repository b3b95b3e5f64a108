"""Compiled layers: updates run transformers' layers as fused code, one code for all layers of a kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_ppo.models.forward.packing import exclude_from_compilation

BACKEND = "inductor"
"""What torch.compile makes code with."""

_COMPILED = "_rlhf_ppo_compiled"
"""Attribute of a layer: its compiled forward pass."""


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that can be compiled, and whose activations can be recomputed, one by one."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def require_layers(model: nn.Module, setting: str) -> list[nn.Module]:
    """Return the model's layers; raise a ValueError that names the setting if there are none."""
    layers = transformer_layers(model)
    if not layers:
        raise ValueError(f"{setting}: the model has no layers that transformers can checkpoint; leave it out")
    return layers


@contextmanager
def compiled_layers(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Let passes inside that compute gradients run compiled code, forward and backward, if ``on``.

    Layers are compiled at their first pass. Lengths are dynamic, so that sequences of other lengths run the same code;
    a few things make code of their own: a row alone, another adapter, frozen weights. Outside nothing has changed, so
    that a compiled decode step meets the layers it knows.
    """
    layers = transformer_layers(model) if on else []
    bare = [layer for layer in layers if "forward" not in vars(layer)]  # the others' activations are recomputed
    for layer in layers:
        setattr(layer, _COMPILED, _compile(type(layer), BACKEND))
    for layer in bare:
        layer.forward = MethodType(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            delattr(layer, _COMPILED)
        for layer in bare:
            del layer.forward


def layer_forward(layer: nn.Module) -> Callable[..., Any]:
    """Return a layer's forward pass as a function of the layer and its arguments: compiled, or plain."""
    compiled = vars(layer).get(_COMPILED) if torch.is_grad_enabled() else None
    return type(layer).forward if compiled is None else compiled


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer_forward(self)(self, *args, **kwargs)


@cache
def _compile(kind: type[nn.Module], backend: str) -> Callable[..., Any]:
    exclude_from_compilation()
    return torch.compile(kind.forward, dynamic=True, backend=backend)
