"""Save activation memory: gradient checkpointing (recompute layers in the backward pass), or offload to main memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from rlhf_ppo.models.acceleration.compiled_layers import layer_forward, require_layers
from rlhf_ppo.models.adapters.lora import current_adapter
from rlhf_ppo.models.forward.packing import current_packing


def checkpoint_layers(model: nn.Module) -> None:
    """Switch gradient checkpointing on: each layer saves its input and recomputes the rest in the backward pass.

    transformers' own switch works only in training mode, which turns dropout on. Here nothing changes where no
    gradient is needed: decoding keeps its cache.

    Raises:
        ValueError: the model has no layers that transformers can checkpoint.
    """
    for layer in require_layers(model, "gradient_checkpointing"):
        layer.forward = MethodType(_forward, layer)  # a method, so that a deep copy of the model gets its own


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = layer_forward(self)
    if not torch.is_grad_enabled():
        return forward(self, *args, **kwargs)
    # The recomputation must run under the packing and the adapter of the forward pass.
    packing, adapter = current_packing(), current_adapter(self)

    @contextmanager
    def recompute() -> Iterator[None]:
        with packing, adapter:
            yield

    return checkpoint(
        partial(forward, self, **kwargs),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is random in evaluation mode
        context_fn=lambda: (nullcontext(), recompute()),
    )


def offload_activations(*, on: bool) -> AbstractContextManager[Any]:
    """Keep what the backward pass needs in main memory until then, if ``on``; weights stay on the device.

    Both copies are queued among the device's work, from and to pinned memory, so that the host waits for neither.
    """
    if not on:
        return nullcontext()

    def pack(x: Tensor) -> Any:
        owner = x if x._base is None else x._base
        if isinstance(owner, nn.Parameter):
            return x
        return x.device, x.to("cpu", non_blocking=x.device.type == "cuda")

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, kept = packed
        return kept.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
