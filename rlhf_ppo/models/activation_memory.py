"""Activations: computed again in the backward pass, or kept in main memory, instead of held on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_ppo.models.forward.packing import same_packing
from rlhf_ppo.models.lora import same_adapter


def checkpoint_layers(model: nn.Module) -> None:
    """Let every layer keep only its input where gradients are computed, and compute the rest again when they are.

    transformers' own switch works in training mode alone, which turns dropout on. Here nothing changes where no
    gradient is wanted: decoding keeps its cache.

    Raises:
        ValueError: the model has no layers that transformers can checkpoint.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError("gradient_checkpointing: the model has no layers that transformers can checkpoint")
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # a method, so that a deep copy of the model gets its own


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(self).forward
    if not torch.is_grad_enabled():
        return forward(self, *args, **kwargs)
    # The second time, everything that decides what the layer computes must be as it is now.
    packing, adapter = same_packing(), same_adapter(self)

    @contextmanager
    def again() -> Iterator[None]:
        with packing, adapter:
            yield

    return checkpoint(
        partial(forward, self, **kwargs),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn in evaluation mode
        context_fn=lambda: (nullcontext(), again()),
    )


def offload_activations(*, on: bool) -> AbstractContextManager[Any]:
    """Where this is on, what the backward pass needs waits in main memory until then; weights stay where they are."""
    if not on:
        return nullcontext()
    mover = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(x: Tensor) -> Any:
        owner = x if x._base is None else x._base
        return x if isinstance(owner, nn.Parameter) else mover.pack_hook(x)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else mover.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)
