"""Exact KL to the reference straight from hidden states, without ever holding the [N, V] logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_ppo.core.kernels.vocabulary_blocks import (
    CHUNK_LOGITS,
    ChunkLogits,
    HeadGradients,
    below_largest,
    blocks_of,
    check_ban,
    chunks_of,
    product_dtype,
    without_autocast,
)
from rlhf_ppo.core.types import BannedTokens, compute_dtype, require_temperature, result_dtype


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    ban: BannedTokens | None = None,
) -> Tensor:
    """Compute the exact KL of ``softmax(hidden @ weight.T + bias)`` to the reference's, without the [N, V] logits.

    The same as :func:`~rlhf_ppo.core.kl.kl_from_logits` of both logits.

    Works on ``chunk_size`` rows at a time. Rows that fit one chunk are computed once; of more rows, nothing of size V
    is kept for the backward pass, which computes each chunk again. Gradients reach hidden, weight and bias alone.

    Args:
        hidden: [N, O] the policy's last hidden states.
        weight: [V, O] its output embedding.
        ref_hidden: [N, R] the reference's last hidden states; R may differ from O.
        ref_weight: [V, R] its output embedding.
        bias, ref_bias: [V] or None.
        temperature: divides both logits.
        chunk_size: rows of logits held at once; None: as many as make 2^24 logits for each of the two.
        ban: tokens without probability in some rows, for policy and reference.
    Returns:
        [N] nats.
    Raises:
        ValueError: shapes do not fit, or temperature or chunk_size is not positive.
    """
    for name, states, embedding in (("", hidden, weight), ("ref_", ref_hidden, ref_weight)):
        if states.ndim != 2 or embedding.ndim != 2 or states.shape[1] != embedding.shape[1]:
            raise ValueError(
                f"{name}hidden {tuple(states.shape)} must be [N, O] and {name}weight {tuple(embedding.shape)} [V, O]"
            )
    if len(hidden) != len(ref_hidden) or len(weight) != len(ref_weight):
        raise ValueError(
            f"policy and reference must agree on N and V: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
            f"ref_hidden {tuple(ref_hidden.shape)}, ref_weight {tuple(ref_weight.shape)}"
        )
    for name, offset in (("bias", bias), ("ref_bias", ref_bias)):
        if offset is not None and offset.shape != weight.shape[:1]:
            raise ValueError(f"{name} {tuple(offset.shape)} must be [V] for weight {tuple(weight.shape)}")
    if chunk_size is None:
        chunk_size = max(CHUNK_LOGITS // (2 * max(weight.shape[0], 1)), 1)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, got {chunk_size}")
    require_temperature(temperature)
    check_ban(ban, len(hidden))
    apply = cast(Callable[..., Tensor], _LinearKL.apply)  # torch leaves apply untyped
    return apply(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, chunk_size, ban)


class _LinearKL(torch.autograd.Function):
    """Goes through the vocabulary block by block, as linear_logprobs does.

    With gap = log p - log q, the KL is sum p gap, and its gradient by a logit p (gap - KL). Of a single chunk of rows
    forward keeps that gradient; of several, backward computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        temperature: float,
        chunk_size: int,
        ban: BannedTokens | None,
    ) -> Tensor:
        count, vocabulary = len(hidden), len(weight)
        dtype, low = compute_dtype(hidden), product_dtype(hidden, weight)
        ctx.low, ctx.temperature, ctx.chunk_size, ctx.ban = low, temperature, chunk_size, ban
        ctx.blocks = blocks_of(vocabulary, min(chunk_size, count), hidden.device)
        kl, normaliser, ref_normaliser = torch.empty(3, count, dtype=dtype, device=hidden.device)
        kept = gaps = None
        if count <= chunk_size and any(ctx.needs_input_grad[:3]):
            kept, gaps = (torch.empty(vocabulary, count, dtype=low, device=hidden.device) for _ in range(2))
        with without_autocast(hidden):
            for rows in chunks_of(count, chunk_size):
                settings: dict[str, Any] = {"temperature": temperature, "low": low, "rows": rows, "ban": ban}
                policy = ChunkLogits(hidden, weight, bias, **settings)
                reference = ChunkLogits(ref_hidden, ref_weight, ref_bias, **settings)
                numbers = torch.empty(5, len(ctx.blocks), len(kl[rows]), dtype=dtype, device=hidden.device)
                maxima, ref_maxima, totals, ref_totals, sums = numbers
                for i, block in enumerate(ctx.blocks):
                    gap, maxima[i] = below_largest(policy.block(block, None if gaps is None else gaps[block]))
                    ref, ref_maxima[i] = below_largest(reference.block(block))
                    e = torch.exp(gap, out=None if kept is None else kept[block])
                    # What is banned, or as good as banned, adds nothing, whatever the reference says of it.
                    gap.sub_(ref).masked_fill_(e == 0, 0.0)
                    totals[i] = e.sum(dim=0, dtype=dtype)
                    ref_totals[i] = ref.exp_().sum(dim=0, dtype=dtype)
                    sums[i] = (e.to(dtype) * gap).sum(dim=0)
                normaliser[rows] = (maxima + totals.log()).logsumexp(dim=0)
                ref_normaliser[rows] = (ref_maxima + ref_totals.log()).logsumexp(dim=0)
                # log p - log q = gap + offset in each block.
                log_share = maxima - normaliser[rows]
                share, offset = log_share.exp(), log_share - (ref_maxima - ref_normaliser[rows])
                kl[rows] = (share * (sums + totals * offset)).sum(dim=0)
                if kept is not None and gaps is not None:
                    for i, block in enumerate(ctx.blocks):
                        kept[block].mul_((gaps[block].to(dtype) + (offset[i] - kl)).mul_(share[i]))
        ctx.save_for_backward(
            hidden, weight, bias, ref_hidden, ref_weight, ref_bias, normaliser, ref_normaliser, kl, kept
        )
        return kl.to(result_dtype(hidden))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (once_differentiable makes ctx positional)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, normaliser, ref_normaliser, kl, kept = ctx.saved_tensors
        temperature, low = ctx.temperature, ctx.low
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3], temperature=temperature, low=low)
        for rows in chunks_of(len(hidden), ctx.chunk_size):
            settings: dict[str, Any] = {"temperature": temperature, "low": low, "rows": rows, "ban": ctx.ban}
            policy = ChunkLogits(hidden, weight, bias, **settings)
            reference = ChunkLogits(ref_hidden, ref_weight, ref_bias, **settings)
            for block in ctx.blocks:
                if kept is None:
                    log_p = policy.block(block).to(kl.dtype).sub_(normaliser[rows])
                    p = log_p.exp()
                    gap = log_p.sub_(reference.block(block)).add_(ref_normaliser[rows] - kl[rows])
                    slope = p.mul_(gap.masked_fill_(p == 0, 0.0)).to(low)
                else:
                    slope = kept[block]
                gradients.add(rows, block, policy.states, slope, grad_outputs[0][rows].to(kl.dtype))
        return *gradients.result(), None, None, None, None, None, None
