"""Compute in bfloat16: a rounded copy of the weights, made once per optimizer step, that every pass reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_ppo.core.kernels.vocabulary_blocks import under_autocast
from rlhf_ppo.models.forward.hidden_states import without_adapter_wrapper

_HOOKED: WeakSet[nn.Module] = WeakSet()
"""Embeddings, norms and heads whose outputs hooks convert under autocast."""

_NORMS_FIRST = frozenset(
    "cohere cohere2 exaone falcon gemma gemma2 gemma3_text glm glm4 gpt2 gpt_neo gpt_neox gptj granite llama mistral "
    "mixtral olmo olmo2 phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2".split()
)
"""Decoders whose norms are read by linear layers alone: no norm's result is the residual stream."""

_PLACES: WeakKeyDictionary[nn.Module, list[tuple[nn.Module, str]]] = WeakKeyDictionary()
"""Where a model has weights of products and embeddings. Autocast rounds those of layers that are added later."""


@contextmanager
def computing(*models: nn.Module, bf16: bool) -> Iterator[None]:
    """Let forward, backward and decode passes inside multiply in bfloat16, if ``bf16``.

    Inside, linear layers and embeddings hold a copy of their weights that was rounded after the last optimizer step;
    gradients add up in float32. Outside they hold the float32 weights, with those gradients. Autocast converts what
    other layers return, and the residual stream stays in float32, as do norms, value heads and classifiers' heads.
    Sharded weights are rounded where they are gathered.

    Args:
        models: policy and critic, a reference, a reward model.
        bf16: False: nothing changes.
    """
    if not bf16:
        yield
        return
    swaps = [swap for model in models for swap in _swaps(model)]
    _round(swaps)
    device = next(models[0].parameters()).device
    active = under_autocast(device)
    try:
        for module, name, weight, low in swaps:
            module._parameters[name] = low
            low.requires_grad_(weight.requires_grad)
            if low.grad is None:
                low.grad = weight.grad
            elif weight.grad is not None and low.grad is not weight.grad:  # of a backward pass outside
                low.grad += weight.grad
        with nullcontext() if active else torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    finally:
        for swap in swaps:
            swap.module._parameters[swap.name] = swap.weight
        for weight, low in {id(swap.weight): swap[2:] for swap in swaps}.values():  # tied weights have one copy
            weight.grad, low.grad = low.grad, None


def round_again(*models: nn.Module) -> None:
    """Let weights be rounded again that have changed through ``.data``, which counts no version."""
    for model in models:
        for weight in matrices(model):
            if hasattr(weight, "_rlhf_ppo_low"):
                cast(Any, weight)._rlhf_ppo_rounded = None


def hold_in_bf16(model: nn.Module) -> None:
    """Round frozen weights in place, once for all passes: those that :func:`computing` has copies of.

    Whoever calls the model itself, outside of it, need not know: its forward pass then computes in bfloat16, too.
    """
    for weight in matrices(model):
        if _has_copy(weight) and not weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    inner = without_adapter_wrapper(model)
    for part in {inner, inner.base_model}:
        part.forward = MethodType(_by_itself(type(part).forward), part)  # a method: a deep copy gets its own


def _by_itself(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = next(self.parameters()).device
        inside = under_autocast(device) or not held_in_bf16(self)
        with nullcontext() if inside else torch.autocast(device.type, dtype=torch.bfloat16):
            return forward(self, *args, **kwargs)

    return run


def held_in_bf16(model: nn.Module) -> bool:
    """Return whether some of a model's weights are held in bfloat16, so that it runs inside :func:`computing` alone.

    A model that was given in bfloat16, norms included, runs as it is.
    """
    return _exact_norms(model) and any(weight.dtype == torch.bfloat16 for _, _, weight in _matrices(model))


class _Swap(NamedTuple):
    module: nn.Module
    name: str
    weight: nn.Parameter
    low: nn.Parameter


def matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights that have a rounded copy or are held rounded: those of products and embeddings."""
    return (weight for _, _, weight in _matrices(model))


def _swaps(model: nn.Module) -> Iterator[_Swap]:
    """Yield the float32 weights that have a rounded copy, once for each module that reads them."""
    for module, name, weight in _matrices(model):
        if _has_copy(weight):
            yield _Swap(module, name, weight, _copy_of(weight))


def _has_copy(weight: nn.Parameter) -> bool:
    return weight.dtype == torch.float32 and not isinstance(weight, DTensor)


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the weights of products and embeddings: (module, name in it, weight)."""
    if model not in _PLACES:
        _round_outputs(model)
        _PLACES[model] = list(_find_places(model))
    for module, name in _PLACES[model]:
        if (weight := module._parameters.get(name)) is not None:
            yield module, name, weight


def _find_places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    exact = _exact_heads(model)
    for module in model.modules():
        product = isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
        for name, weight in module._parameters.items():
            # Experts are stacks of matrices.
            if weight is not None and (product or weight.ndim == 3) and id(weight) not in exact:
                yield module, name


def _copy_of(weight: nn.Parameter) -> nn.Parameter:
    """Return the parameter that holds a weight's rounded copy; it lives as long as the weight."""
    low = getattr(weight, "_rlhf_ppo_low", None)
    if low is None or low.device != weight.device or low.shape != weight.shape:
        low = nn.Parameter(torch.empty_like(weight, dtype=torch.bfloat16), requires_grad=weight.requires_grad)
        low.grad_dtype = torch.float32
        cast(Any, weight)._rlhf_ppo_low = low
        cast(Any, weight)._rlhf_ppo_rounded = None
    return low


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Count a version of what an optimizer has changed, which fused optimizers do not."""
    weights = [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, "_rlhf_ppo_low")]
    increment_version(weights)


register_optimizer_step_post_hook(_count_step)


@torch.no_grad()
def _round(swaps: list[_Swap]) -> None:
    """Round the weights that have changed since they were last rounded, in one fused pass."""
    stale = {id(swap.weight): swap for swap in swaps if cast(Any, swap.weight)._rlhf_ppo_rounded != _state(swap.weight)}
    if not stale:
        return
    cast(Any, torch)._foreach_copy_(
        *([getattr(x, name).detach() for x in stale.values()] for name in ("low", "weight"))
    )
    for swap in stale.values():
        cast(Any, swap.weight)._rlhf_ppo_rounded = _state(swap.weight)


def _state(weight: nn.Parameter) -> tuple[int, int]:
    """Return what changes when a weight does, but not through ``.data``."""
    return weight._version, weight.data_ptr()


def _exact_heads(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of value heads and classifiers' heads."""
    heads = {id(p) for name, child in model.named_children() if name == "value_head" for p in child.parameters()}
    for inner in model.modules():
        kinds = [kind.__name__ for kind in type(inner).__mro__]
        if isinstance(inner, PreTrainedModel) and any(name.endswith("ForSequenceClassification") for name in kinds):
            heads |= {id(p) for p in inner.parameters()} - {id(p) for p in inner.base_model.parameters()}
    return heads


def _round_outputs(model: nn.Module) -> None:
    """Let norms return bfloat16 under autocast, once for all that read them, embeddings rounded rows, heads float32."""
    if not _exact_norms(model):
        return
    heads = _exact_heads(model)
    decoders = [x for x in model.modules() if isinstance(x, PreTrainedModel) and x.config.model_type in _NORMS_FIRST]
    feeding = {id(module) for decoder in decoders for module in decoder.modules()}
    for module in model.modules():
        hook: Callable[..., Any] | None = None
        if isinstance(module, nn.Embedding):
            hook = _rounded_rows
        elif isinstance(module, nn.Linear) and id(module.weight) in heads:
            hook = _exact_output
        elif _is_norm(module) and id(module) in feeding:
            hook = _rounded_output
        if hook is not None and module not in _HOOKED:
            module.register_forward_hook(hook)
            _HOOKED.add(module)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _exact_norms(model: nn.Module) -> bool:
    norms = (p for module in model.modules() if _is_norm(module) for p in module.parameters(recurse=False))
    return all(p.dtype == torch.float32 for p in norms)


def _rounded_rows(_module: nn.Module, _inputs: Any, rows: Any) -> Any:
    # Sharded embeddings are gathered in float32.
    if isinstance(rows, Tensor) and under_autocast(rows.device):
        return rows.bfloat16().float()
    return rows


def _exact_output(layer: nn.Linear, inputs: Any, output: Tensor) -> Tensor:
    # A score of 8 bits would make ties.
    if not under_autocast(output.device):
        return output
    with torch.autocast(output.device.type, enabled=False):
        return linear(inputs[0].float(), layer.weight, layer.bias)


def _rounded_output(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor) and under_autocast(output.device):
        return output.bfloat16()
    return output
