"""Log-probs and entropy straight from hidden states, without ever holding the [N, V] logits."""

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
    places_in,
    product_dtype,
    without_autocast,
)
from rlhf_ppo.core.types import BannedTokens, compute_dtype, require_temperature, require_token_ids


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    return_entropy: bool = False,
    ban: BannedTokens | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute log-probs of ``tokens`` under ``softmax((hidden @ weight.T + bias) / temperature)``.

    Never holds the [N, V] logits: works on ``chunk_size`` rows at a time, so its peak memory is [chunk_size, V]. Rows
    that fit one chunk are computed once and kept for the backward pass, which recomputes the logits of more rows.
    Gradients of log-probs and entropy reach hidden, weight and bias.

    Args:
        hidden: [N, O] last hidden states.
        weight: [V, O] output embedding.
        tokens: [N] integer ids below V.
        bias: [V] or None.
        temperature: divides the logits.
        chunk_size: rows of logits held at once; None: as many as make 2^25 logits (128 MiB in float32).
        return_entropy: also return the entropy of each row's distribution.
        ban: tokens without probability in some rows; the others share it.
    Returns:
        [N] log-probs in nats, or (log-probs [N], entropy [N]).
    Raises:
        ValueError: shapes do not fit, temperature or chunk_size is not positive, or (on CPU) an id is out of range.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} must be [N, O] and weight {tuple(weight.shape)} [V, O]")
    if tokens.shape != hidden.shape[:1]:
        raise ValueError(f"tokens {tuple(tokens.shape)} must be [N] for hidden {tuple(hidden.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [V] for weight {tuple(weight.shape)}")
    if chunk_size is None:
        chunk_size = max(CHUNK_LOGITS // max(weight.shape[0], 1), 1)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, got {chunk_size}")
    require_temperature(temperature)
    require_token_ids(tokens, weight.shape[0])
    check_ban(ban, len(hidden))
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _LinearLogprobs.apply)  # torch leaves apply untyped
    logprobs, entropy = apply(hidden, weight, bias, tokens.long(), temperature, chunk_size, return_entropy, ban)
    return (logprobs, entropy) if return_entropy else logprobs


class _LinearLogprobs(torch.autograd.Function):
    """Works on blocks of the vocabulary, so that what a product writes is still in the cache when it is read.

    Forward keeps ``exp(logit - largest of its block)`` of a single chunk of rows, and the products of backward read it
    as it is: what turns it into a gradient is one factor a row, which multiplies the smaller side of each product. Of
    several chunks only the log-normalisers are kept, and backward recomputes the exponentials. Under autocast, all of
    [block, n] is in autocast's format, and sums are in the compute dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        chunk_size: int,
        return_entropy: bool,
        ban: BannedTokens | None,
    ) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        ctx.low = product_dtype(hidden, weight)
        ctx.temperature, ctx.chunk_size, ctx.return_entropy, ctx.ban = temperature, chunk_size, return_entropy, ban
        dtype, smallest = compute_dtype(hidden), torch.finfo(compute_dtype(hidden)).min
        blocks = blocks_of(weight.shape[0], min(chunk_size, count), hidden.device)
        chosen = torch.zeros(count, dtype=dtype, device=hidden.device)
        entropy, normaliser = torch.empty_like(chosen), torch.empty_like(chosen)
        maxima, totals, sums = (chosen.new_empty(len(blocks), count) for _ in range(3))
        keeps = count <= chunk_size and any(ctx.needs_input_grad[:3])
        kept = torch.empty(weight.shape[0], count, dtype=ctx.low, device=hidden.device) if keeps else None
        with without_autocast(hidden):
            for rows in chunks_of(count, chunk_size):
                chunk = ChunkLogits(hidden, weight, bias, temperature=temperature, low=ctx.low, rows=rows, ban=ban)
                for i, block in enumerate(blocks):
                    logits = chunk.block(block, None if kept is None else kept[block])
                    place, inside = places_in(tokens[rows], block)
                    chosen[rows] = torch.where(inside, logits.gather(0, place)[0], chosen[rows])
                    logits, maxima[i, rows] = below_largest(logits)
                    distance = logits.to(dtype, copy=True) if return_entropy else None
                    e = logits.exp_().to(dtype)
                    totals[i, rows] = e.sum(dim=0)
                    if distance is not None:
                        sums[i, rows] = distance.clamp_(min=smallest).mul_(e).sum(dim=0)
                normaliser[rows] = (maxima[:, rows] + totals[:, rows].log()).logsumexp(dim=0)
        logprobs = chosen.sub_(normaliser)
        if return_entropy:
            shifts = maxima - normaliser
            entropy = -((sums + shifts * totals) * shifts.exp()).sum(dim=0)
        ctx.kept, ctx.blocks = kept, blocks
        ctx.save_for_backward(hidden, weight, bias, tokens, normaliser, entropy, maxima)
        return logprobs.to(hidden.dtype), entropy.to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (once_differentiable makes ctx positional)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grad_outputs
        hidden, weight, bias, tokens, normaliser, entropy, maxima = ctx.saved_tensors
        dtype, temperature = normaliser.dtype, ctx.temperature
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3], temperature=temperature, low=ctx.low)
        # What was kept is overwritten below, so a second backward pass (retain_graph) computes it again.
        kept, ctx.kept = ctx.kept, None
        for rows in chunks_of(hidden.shape[0], ctx.chunk_size):
            chunk = ChunkLogits(hidden, weight, bias, temperature=temperature, low=ctx.low, rows=rows, ban=ctx.ban)
            upstream, scale = grad_logprobs[rows].to(dtype), grad_entropy[rows].to(dtype)
            missing, columns = torch.ones_like(upstream), torch.arange(len(upstream), device=hidden.device)
            for i, block in enumerate(ctx.blocks):
                e = chunk.block(block).sub_(maxima[i, rows].to(ctx.low)).exp_() if kept is None else kept[block]
                share = (maxima[i, rows] - normaliser[rows]).exp_()
                # d logprob / d logit = onehot - p; d entropy / d logit = -p * (log p + entropy); p = e * share.
                # The chosen token's 1 - p is ``missing``: apart, it loses nothing to rounding.
                slope = None
                if ctx.return_entropy:
                    p = e.to(dtype) * share
                    # Far below the log of any p above 0, and small enough that no scale makes 0 * inf of it.
                    slope = p.mul_(scale * (p.log().clamp_(min=-1e4) + entropy[rows]))
                place, inside = places_in(tokens[rows], block)
                of_token = e.gather(0, place)
                missing.sub_(of_token[0] * share * inside)
                # Not scatter_, which copies all of e twice on CPU.
                e.index_put_((place[0], columns), of_token[0].masked_fill_(inside, 0))
                factor = -upstream * share
                if slope is not None:
                    e, factor = slope.add_(e * -factor).to(ctx.low), torch.full_like(factor, -1.0)
                gradients.add(rows, block, chunk.states, e, factor)
            missing.mul_(upstream / temperature)
            if gradients.bias is not None:
                gradients.bias.index_put_((tokens[rows],), missing, accumulate=True)
            if gradients.hidden is not None:
                gradients.hidden[rows].addcmul_(missing[:, None], weight[tokens[rows]].to(dtype))
            if gradients.weight is not None:
                of_tokens = missing[:, None] * hidden[rows].to(dtype)
                gradients.weight.index_put_((tokens[rows],), of_tokens, accumulate=True)
        return *gradients.result(), None, None, None, None, None


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the [N, V] logits ``hidden @ weight.T + bias`` as :func:`linear_logprobs` does, without gradients."""
    low, dtype = product_dtype(hidden, weight), compute_dtype(hidden)
    with without_autocast(hidden):
        chunk = ChunkLogits(hidden, weight, bias, low=low)
        if chunk.shift is None:
            return chunk.block(slice(0, weight.shape[0])).to(dtype).T
        # In half precision rows of the vocabulary are no faster, and a draw reads rows of states.
        logits = torch.addmm(-chunk.shift[:, None], chunk.states.T, weight.to(low).T)
        if bias is not None:
            logits.add_(bias.to(low))
        return logits.to(dtype).add_(chunk.shift[:, None])
