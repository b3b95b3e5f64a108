"""Calling: a transformers model's forward pass with the arguments that it reads, and the states behind its logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn


def without_adapter_wrapper(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, adapters in place; any other model itself."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def call(
    model: nn.Module, ids: Tensor, positions: Tensor | None = None, attention: Tensor | None = None, **kwargs: Any
) -> Any:
    """Run a forward pass; None: the model counts positions itself, and attends to all tokens before each."""
    if positions is not None and accepts(model, "position_ids"):
        kwargs["position_ids"] = positions
    if "past_key_values" in kwargs and not accepts(model, "past_key_values"):
        kwargs["cache_params"] = kwargs.pop("past_key_values")  # its name in Mamba's kin
        attention = attention if ids.shape[1] > 1 else None  # they spread one new token over the whole mask
    elif accepts(model, "use_cache") or accepts(model, "kwargs"):
        kwargs = {"use_cache": False, **kwargs}
    mask = torch.ones_like(ids) if attention is None else attention.long()
    return model(input_ids=ids, attention_mask=mask, **kwargs)


def probe_ids(model: nn.Module, length: int = 8) -> Tensor:
    """Return token ids [1, length] of the model's vocabulary to look at it with, on its device."""
    vocabulary = int(without_adapter_wrapper(model).config.get_text_config().vocab_size)
    return torch.arange(1, length + 1, device=next(model.parameters()).device)[None] * 7 % vocabulary


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward pass has an argument of that name; "kwargs": whether it takes any."""
    return name in _forward_parameters(type(without_adapter_wrapper(model)))


@cache
def _forward_parameters(model_class: type[nn.Module]) -> frozenset[str]:
    # Looked up at every decoding step, so read once a class. A forward(*args, **kwargs) takes what its parent's takes.
    names: set[str] = set()
    for cls in model_class.__mro__:
        if "forward" in vars(cls):
            parameters = inspect.signature(cls.forward).parameters
            found = {"kwargs" if p.kind is p.VAR_KEYWORD else name for name, p in parameters.items()}
            names |= found
            if "kwargs" not in found:
                break
    return frozenset(names)


@contextmanager
def noting_states(trunk: nn.Module) -> Iterator[list[Tensor]]:
    """While this lasts, the last hidden states [B, L, O] that the trunk gives are put into the list."""
    noted: list[Tensor] = []
    handle = trunk.register_forward_hook(lambda _module, _inputs, output: noted.append(states_of(output)))
    try:
        yield noted
    finally:
        handle.remove()


def states_of(output: Any) -> Tensor:
    """The last hidden states of what a trunk returned."""
    states = getattr(output, "last_hidden_state", None)
    return cast(Tensor, output[0] if states is None else states)
