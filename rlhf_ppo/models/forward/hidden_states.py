"""Run a transformers model's forward pass with the arguments it accepts, and capture its last hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn


def without_adapter_wrapper(model: nn.Module) -> Any:
    """Return the transformers model inside a PEFT model, adapters in place; any other model itself."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""What a cache is called: from transformers 5.24 on, before it, and before it in Mamba models."""


def call(
    model: nn.Module,
    ids: Tensor,
    positions: Tensor | None = None,
    attention: Tensor | None = None,
    *,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """Run a forward pass; by default the model counts positions itself, every token is real, and nothing is cached."""
    if positions is not None and accepts(model, "position_ids"):
        kwargs["position_ids"] = positions
    if cache is not None:
        name = next((name for name in CACHE_ARGUMENTS if accepts(model, name)), "past_key_values")
        kwargs |= {name: cache, "use_cache": True}
        if ids.shape[1] == 1 and getattr(model, "_is_stateful", False) and not accepts(model, "position_ids"):
            attention = None  # Mamba models would broadcast one new token over the whole mask
    elif accepts(model, "use_cache") or accepts(model, "kwargs"):
        kwargs["use_cache"] = False
    mask = torch.ones_like(ids) if attention is None else attention.long()
    return model(input_ids=ids, attention_mask=mask, **kwargs)


def accepts(model: nn.Module, name: str) -> bool:
    """Return whether the model's forward pass has an argument of that name; "kwargs": whether it takes any."""
    return name in _forward_parameters(type(without_adapter_wrapper(model)))


@cache
def _forward_parameters(model_class: type[nn.Module]) -> frozenset[str]:
    # Needed at every decode step, so inspected once per class. forward(*args, **kwargs) takes what its parent's takes.
    names: set[str] = set()
    for cls in model_class.__mro__:
        if "forward" in vars(cls):
            parameters = inspect.signature(cls.forward).parameters
            found = {"kwargs" if p.kind is p.VAR_KEYWORD else name for name, p in parameters.items()}
            names |= found
            if "kwargs" not in found:
                break
    return frozenset(names)


def probe_ids(model: nn.Module, length: int = 8) -> Tensor:
    """Return token ids [1, length] of the model's vocabulary, on its device, to test the model with."""
    vocabulary = int(without_adapter_wrapper(model).config.get_text_config().vocab_size)
    return torch.arange(1, length + 1, device=next(model.parameters()).device)[None] * 7 % vocabulary


@contextmanager
def capture_states(trunk: nn.Module) -> Iterator[list[Tensor]]:
    """Append the last hidden states [B, L, O] of every forward pass of the trunk to the list."""
    captured: list[Tensor] = []
    handle = trunk.register_forward_hook(lambda _module, _inputs, output: captured.append(last_states(output)))
    try:
        yield captured
    finally:
        handle.remove()


def last_states(output: Any) -> Tensor:
    """Return the last hidden states in a trunk's output."""
    states = getattr(output, "last_hidden_state", None)
    return cast(Tensor, output[0] if states is None else states)
