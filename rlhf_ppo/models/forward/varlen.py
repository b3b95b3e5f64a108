"""Causal attention within sequences that lie end to end, by torch's flash attention kernel on GPUs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_LENGTHS = (3, 150)
"""Tokens of the sequences that the kernel is tried on; from 129 on, newer versions may take another one."""


def kernel_dtype(query: Tensor) -> torch.dtype | None:
    """Return the format in which the kernel attends; None: it is for GPUs and 16 bits, and this is neither."""
    if query.device.type != "cuda":
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None
) -> Tensor:
    """Attend within each sequence to its tokens so far.

    Args:
        query: [N, H, D].
        key, value: [N, K, D]; H is a multiple of K.
        bounds: [B + 1] int32 where each sequence begins, and where the last one ends.
        longest: tokens of the longest one.
        scale: of the scores; None: 1 / sqrt(D).
    Returns:
        [N, H, D].
    Raises:
        RuntimeError: the kernel is not for these sizes or this GPU, or gives other numbers than plain attention.
    """
    if not torch.compiler.is_compiling():
        _require_right(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2])
    return _call_kernel(query, key, value, bounds, longest, scale)


def _call_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None
) -> Tensor:
    """Call the kernel as the installed version of torch wants it: 2.10, 2.11 and 2.12 differ."""
    from torch.nn.attention.varlen import varlen_attn  # takes a second, which a CPU need not spend

    accepted = _parameters(varlen_attn)
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    width, groups = query.shape[2], query.shape[1] // key.shape[1]
    if "scale" in accepted:
        options["scale"] = scale
    elif scale is not None and scale != width**-0.5:
        query = query * (scale * width**0.5)
    if groups > 1 and "enable_gqa" in accepted:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return cast(Tensor, varlen_attn(query, key, value, bounds, bounds, longest, longest, **options))


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@cache
@torch.enable_grad()
def _require_right(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> None:
    """Raise a RuntimeError unless the kernel's result and gradients are those of plain attention."""
    draw = torch.Generator(device).manual_seed(0)
    query, key, value = inputs = [
        torch.randn(sum(_LENGTHS), n, width, generator=draw, device=device).to(dtype).requires_grad_()
        for n in (heads, key_heads, key_heads)
    ]
    upstream = torch.randn(sum(_LENGTHS), heads, width, generator=draw, device=device).to(dtype)
    bounds = torch.tensor([0, _LENGTHS[0], sum(_LENGTHS)], dtype=torch.int32, device=device)
    with torch.autocast(device.type, enabled=False):
        found = _call_kernel(query, key, value, bounds, max(_LENGTHS), None)
        apart = zip(*(x.float().split(_LENGTHS) for x in inputs), strict=True)
        plain = torch.cat([_plain(*parts) for parts in apart])
        results = [(found, plain)]
        gradients = torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(plain, inputs, upstream.float())
    results += zip(*gradients, strict=True)
    for one, other in results:
        gap, largest = (float(x.detach().abs().max()) for x in (one.float() - other.float(), other))
        if not gap <= 0.05 * largest:
            raise RuntimeError(f"torch's attention kernel is wrong by {gap:.2g} of {largest:.2g} on this GPU")


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend within one sequence, [L, H, D]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
