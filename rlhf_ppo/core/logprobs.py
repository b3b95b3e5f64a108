"""Log-probs of chosen tokens, from logits or straight from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_ppo.core.types import compute_dtype, require_same_shape, require_temperature, result_dtype

CHUNK_LOGITS = 2**25
"""Most logits that linear_logprobs holds at once unless told otherwise: 128 MiB in float32."""

# What linear_logprobs works on at a time: 4 MiB of float32 logits, but no fewer than 256 words.
_BLOCK_LOGITS, _BLOCK_WORDS = 2**20, 256

# Words among which the largest logit is looked for before the product: the first ones (in BPE the most frequent), and
# as many spread over the rest.
_SAMPLE = 1024


def token_logprobs(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """``log softmax(logits / temperature)[token]``.

    Args:
        logits: [*, V] unnormalised log-probabilities; -inf bans a token.
        tokens: [*] integer ids below V.
        temperature: divides the logits; the same one as at sampling.
        dtype: of the result; default: the logits'. bfloat16 logits give float32 log-probs without a copy of all logits.
    Returns:
        [*] log-probs in nats.
    Raises:
        ValueError: shapes do not fit, temperature is not positive, or (on CPU) an id is out of range.
    """
    if logits.ndim == 0:
        raise ValueError("logits must be [*, V], got a scalar")
    require_same_shape(tokens=tokens, logits_without_vocabulary=logits[..., 0])
    require_temperature(temperature)
    _check_ids(tokens, logits.shape[-1])
    apply = cast(Callable[..., Tensor], _TokenLogprobs.apply)  # torch leaves apply untyped
    return apply(logits, tokens.long(), temperature).to(dtype or result_dtype(logits))


class _TokenLogprobs(torch.autograd.Function):
    """Makes nothing as large as the logits but their gradient; goes through the vocabulary as linear_logprobs does."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        words, flat = logits.reshape(-1, logits.shape[-1]).T, tokens.flatten()  # [V, N]
        dtype = compute_dtype(logits)
        blocks = _blocks(words.shape[0], words.shape[1], logits.device)
        maxima, totals = (torch.empty(len(blocks), len(flat), dtype=dtype, device=logits.device) for _ in range(2))
        for i, block in enumerate(blocks):
            part = _scaled(words[block], temperature, dtype)
            # A block of banned tokens has no largest logit to subtract.
            maxima[i] = part.amax(dim=0).clamp_(min=torch.finfo(dtype).min)
            totals[i] = part.sub_(maxima[i]).exp_().sum(dim=0)
        normaliser = (maxima + totals.log()).logsumexp(dim=0)
        chosen = _scaled(words.gather(0, flat[None])[0], temperature, dtype)
        ctx.temperature, ctx.blocks = temperature, blocks
        ctx.save_for_backward(logits, flat, normaliser)
        return (chosen - normaliser).view(tokens.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (once_differentiable makes ctx positional)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, tokens, normaliser = ctx.saved_tensors
        words, upstream = logits.reshape(-1, logits.shape[-1]).T, grad_outputs[0].flatten() / ctx.temperature
        grad = torch.empty_like(words)
        for block in ctx.blocks:
            # d logprob / d logit = (onehot - p) / temperature
            part = _scaled(words[block], ctx.temperature, normaliser.dtype).sub_(normaliser).exp_().mul_(-upstream)
            place, inside = _places(tokens, block)
            grad[block] = part.scatter_add_(0, place, torch.where(inside, upstream, 0.0)[None])
        return grad.T.reshape(logits.shape), None, None


def _scaled(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """``logits / temperature`` as a new tensor in ``dtype``."""
    logits = logits.to(dtype, copy=True)
    return logits if temperature == 1 else logits.div_(temperature)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of ``tokens`` under ``softmax((hidden @ weight.T + bias) / temperature)``, without the [N, V] logits.

    Works on ``chunk_size`` rows at a time, so its peak memory is [chunk_size, V] whatever N is. Rows that fit one chunk
    are computed once and kept for the backward pass; of more rows, the logits are computed again there. Gradients reach
    hidden, weight and bias, from log-probs and entropy alike.

    Args:
        hidden: [N, O] last hidden states.
        weight: [V, O] output embedding.
        tokens: [N] integer ids below V.
        bias: [V] or None.
        temperature: divides the logits.
        chunk_size: rows of logits held at once; None: as many as make 2^25 logits (128 MiB in float32).
        return_entropy: also return the entropy of each row's distribution.
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
    _check_ids(tokens, weight.shape[0])
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _LinearLogprobs.apply)  # torch leaves apply untyped
    logprobs, entropy = apply(hidden, weight, bias, tokens.long(), temperature, chunk_size, return_entropy)
    return (logprobs, entropy) if return_entropy else logprobs


class _LinearLogprobs(torch.autograd.Function):
    """Goes through the vocabulary block by block, so that what a product writes is still in the cache when it is read.

    Forward keeps ``exp(logit - largest of its block)`` of a single chunk of rows, and backward scales it to the
    softmax; of several chunks only the log-normalisers stay, and backward makes the logits again. Under autocast, the
    products and what is kept are in autocast's format and all sums in the compute dtype.
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
    ) -> tuple[Tensor, Tensor]:
        kind, count = hidden.device.type, hidden.shape[0]
        ctx.low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.temperature, ctx.chunk_size, ctx.return_entropy = temperature, chunk_size, return_entropy
        dtype, smallest = compute_dtype(hidden), torch.finfo(compute_dtype(hidden)).min
        blocks = _blocks(weight.shape[0], min(chunk_size, count), hidden.device)
        logprobs = torch.empty(count, dtype=dtype, device=hidden.device)
        entropy, normaliser = torch.empty_like(logprobs), torch.empty_like(logprobs)
        maxima, totals, sums = (logprobs.new_empty(len(blocks), count) for _ in range(3))
        keeps = count <= chunk_size and any(ctx.needs_input_grad[:3])
        kept = torch.empty(weight.shape[0], count, dtype=ctx.low, device=hidden.device) if keeps else None
        with torch.autocast(kind, enabled=False):
            for rows in _chunks(count, chunk_size):
                states = hidden[rows].to(ctx.low).T
                shift = _shift(states, weight)
                chosen = torch.zeros_like(normaliser[rows])
                for i, block in enumerate(blocks):
                    room = kept[block] if kept is not None and kept.dtype == dtype and not return_entropy else None
                    logits = _block_logits(states, shift, weight, bias, block, temperature, dtype, room)
                    place, inside = _places(tokens[rows], block)
                    chosen = torch.where(inside, logits.gather(0, place)[0], chosen)
                    # A block of banned tokens has no largest logit to subtract.
                    maxima[i, rows] = logits.amax(dim=0).clamp_(min=smallest)
                    logits.sub_(maxima[i, rows])
                    e = logits.exp() if return_entropy else logits.exp_()
                    totals[i, rows] = e.sum(dim=0)
                    if return_entropy:
                        sums[i, rows] = logits.clamp_(min=smallest).mul_(e).sum(dim=0)
                    if kept is not None and room is None:
                        kept[block] = e
                normaliser[rows] = (maxima[:, rows] + totals[:, rows].log()).logsumexp(dim=0)
                logprobs[rows] = chosen - normaliser[rows]
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
        dtype = normaliser.dtype
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Sums over blocks and chunks are kept in the compute dtype and rounded once.
        grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if needs_hidden else None
        grad_weight = torch.empty(weight.shape, dtype=dtype, device=weight.device) if needs_weight else None
        grad_bias = torch.empty(weight.shape[0], dtype=dtype, device=weight.device) if needs_bias else None
        for grad in (grad_weight, grad_bias):
            if grad is not None and not hidden.shape[0]:
                grad.zero_()  # no block will write to it
        # What was kept is overwritten below, so a second backward pass (retain_graph) computes it again.
        kept, ctx.kept = ctx.kept, None
        for rows in _chunks(hidden.shape[0], ctx.chunk_size):
            states = hidden[rows].to(ctx.low)
            shift = _shift(states.T, weight) if kept is None else None
            upstream = grad_logprobs[rows].to(dtype) / ctx.temperature
            scale = grad_entropy[rows].to(dtype) / ctx.temperature
            for i, block in enumerate(ctx.blocks):
                if kept is None:
                    logits = _block_logits(states.T, shift, weight, bias, block, ctx.temperature, dtype)
                    e = logits.sub_(maxima[i, rows]).exp_()
                else:
                    e = kept[block].to(dtype)
                share = (maxima[i, rows] - normaliser[rows]).exp_()
                # d logprob / d logit = onehot - p;   d entropy / d logit = -p * (log p + entropy)
                if ctx.return_entropy:
                    p = e.mul_(share)
                    # Far below the log of any p above 0, and small enough that no scale makes 0 * inf of it.
                    finite_log_p = p.log().clamp_(min=-1e4)
                    grad = p.mul_(-upstream - scale * (finite_log_p + entropy[rows]))
                else:
                    grad = e.mul_(-upstream * share)
                place, inside = _places(tokens[rows], block)
                grad.scatter_add_(0, place, torch.where(inside, upstream, 0.0)[None])
                if grad_bias is not None:
                    grad_bias[block] = grad.sum(dim=1) + (grad_bias[block] if rows.start else 0)
                grad = grad.to(ctx.low)
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], grad.T, weight[block].to(ctx.low), first=i == 0)
                if grad_weight is not None:
                    _add_product(grad_weight[block], grad, states, first=rows.start == 0)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _blocks(vocabulary: int, rows: int, device: torch.device) -> list[slice]:
    """Blocks of the vocabulary whose logits for ``rows`` states stay in a CPU's cache; elsewhere one block."""
    return _chunks(vocabulary, max(_BLOCK_LOGITS // max(rows, 1), _BLOCK_WORDS) if device.type == "cpu" else vocabulary)


def _places(tokens: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Where in a block each token is, [1, n], and whether it is there at all, [n]."""
    place = tokens - block.start
    inside = (place >= 0) & (tokens < block.stop)
    return torch.where(inside, place, 0)[None], inside


def _shift(states: Tensor, weight: Tensor) -> Tensor | None:
    """About the largest logit of each state [O, n] in a format below float32; None: logits need no shift.

    bfloat16 keeps 8 bits: logits near 100, as GPT-2's are, would be rounded to halves. What is rounded is therefore how
    far they lie from this number, which is small for all words that matter.
    """
    if states.dtype == compute_dtype(states):
        return None
    some = torch.cat([weight[:_SAMPLE], weight[_SAMPLE :: max(weight.shape[0] // _SAMPLE, 1)]])
    return (some.to(states.dtype) @ states).amax(dim=0)


def _block_logits(
    states: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    block: slice,
    temperature: float,
    dtype: torch.dtype,
    room: Tensor | None = None,
) -> Tensor:
    """Logits [block, n] in ``dtype``, written into ``room`` if given; the product is in the format of states [O, n]."""
    words = weight[block].to(states.dtype)
    if shift is None:
        logits = torch.mm(words, states, out=room).to(dtype)
    else:  # the product is shifted before it is rounded, and back afterwards
        logits = torch.addmm(-shift, words, states).to(dtype).add_(shift.to(dtype))
    if bias is not None:
        logits.add_(bias[block, None].to(dtype))
    return logits if temperature == 1 else logits.div_(temperature)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``total += a @ b``, or ``total = a @ b`` at first; no temporary where the formats agree."""
    if first and a.dtype == total.dtype:
        torch.mm(a, b, out=total)
    elif first:
        total.copy_(a @ b)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias`` as a new [N, V] tensor as :func:`linear_logprobs` computes it; without gradients."""
    kind = hidden.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        states = hidden.to(low).T
        whole = slice(0, weight.shape[0])
        return _block_logits(states, _shift(states, weight), weight, bias, whole, 1.0, compute_dtype(hidden)).T


def entropy_from_logits(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of ``softmax(logits / temperature)``: [*, V] -> [*]; banned tokens (-inf) add nothing."""
    require_temperature(temperature)
    log_p = (logits.to(compute_dtype(logits)) / temperature).log_softmax(dim=-1)
    return _entropy(log_p).to(result_dtype(logits))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=-1)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def _check_ids(tokens: Tensor, vocabulary: int) -> None:
    if tokens.is_floating_point():
        raise ValueError(f"token ids must be integers, got {tokens.dtype}")
    # On a GPU this look would stall the queue at every call.
    if (
        tokens.device.type == "cpu"
        and tokens.numel()
        and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary)
    ):
        raise ValueError(f"token ids must lie in [0, {vocabulary}), got {int(tokens.min())} to {int(tokens.max())}")
