"""Causal attention by plain products: for bfloat16 on CPU, where torch's fused backward pass is slow."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_ppo.core.kernels.vocabulary_blocks import without_autocast


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attend causally within each of B sequences of equal length; scores and their softmax are in float32.

    Args:
        query: [B, H, L, D]; rounded to the values' dtype, as keys are, because rotary positions made float32 of them.
        key, value: [B, K, L, D] and [B, K, L, W], where K divides H: each serves H / K queries.
        scale: multiplies the scores; None: 1 / sqrt(D).
    Returns:
        [B, L, H, W] in the values' dtype.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return cast(Any, _PlainAttention.apply)(query, key, value, scale)


@lru_cache(maxsize=16)
def _causal(length: int) -> Tensor:
    """Return 0 [L, L] where a token (row) may attend, -inf where it may not."""
    return torch.full((length, length), -math.inf, dtype=torch.float32, device="cpu").triu_(1)


def _batch(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Return heads [B, K, L, D], rounded, as a batch [B * heads, L, D], each repeated for its queries."""
    batch, own, length, width = x.shape
    return x.to(dtype)[:, :, None].expand(batch, own, heads // own, length, width).reshape(-1, length, width)


class _PlainAttention(torch.autograd.Function):
    """Has a few of the operators that autograd records for the same products, and keeps the rounded weights alone.

    Scores are products in float32: their differences decide, and rounding takes a share of their size. What is added up
    with weights below 1 is rounded as the weights are.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (batch, heads, length, _), ctx.scale, low = query.shape, scale, value.dtype
        width = value.shape[-1]
        q, k, v = (_batch(x, heads, low) for x in (query, key, value))
        with without_autocast(value):  # which would round the scores
            scores = torch.baddbmm(_causal(length), q.float(), k.float().mT, alpha=scale)
        weights = scores.softmax(dim=-1).to(low)
        result = value.new_empty(batch, length, heads, width)
        result.copy_(torch.bmm(weights, v).view(batch, heads, length, width).transpose(1, 2))
        ctx.save_for_backward(query, key, value, weights)
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (once_differentiable makes ctx positional)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        heads, scale, low = query.shape[1], ctx.scale, value.dtype
        q, k, v = (_batch(x, heads, low) for x in (query, key, value))
        grad = _batch(grad_outputs[0].transpose(1, 2), heads, low)
        scores = cast(Any, torch)._softmax_backward_data(torch.bmm(grad, v.mT), weights, -1, low).mul_(scale)
        of_query, of_key, of_value = torch.bmm(scores, k), torch.bmm(scores.mT, q), torch.bmm(weights.mT, grad)
        return _summed(of_query, query), _summed(of_key, key), _summed(of_value, value), None


def _summed(gradient: Tensor, x: Tensor) -> Tensor:
    """Add up the gradients [B * H, L, D] of the heads [B, K, L, D] that were repeated."""
    batch, own, length, width = x.shape
    gradient = gradient.view(batch, own, -1, length, width)
    return (gradient.squeeze(2) if gradient.shape[2] == 1 else gradient.sum(dim=2)).to(x.dtype)
