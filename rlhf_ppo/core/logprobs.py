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

    Forward keeps ``exp(logit - largest of its block)`` of a single chunk of rows, and the products of backward read it
    as it is: what turns it into a gradient is one factor a row, which multiplies the smaller side of each product. Of
    several chunks only the log-normalisers stay, and backward makes the exponentials again. Under autocast, all of
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
    ) -> tuple[Tensor, Tensor]:
        kind, count = hidden.device.type, hidden.shape[0]
        ctx.low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.temperature, ctx.chunk_size, ctx.return_entropy = temperature, chunk_size, return_entropy
        dtype, smallest = compute_dtype(hidden), torch.finfo(compute_dtype(hidden)).min
        blocks = _blocks(weight.shape[0], min(chunk_size, count), hidden.device)
        chosen = torch.zeros(count, dtype=dtype, device=hidden.device)
        entropy, normaliser = torch.empty_like(chosen), torch.empty_like(chosen)
        maxima, totals, sums = (chosen.new_empty(len(blocks), count) for _ in range(3))
        keeps = count <= chunk_size and any(ctx.needs_input_grad[:3])
        kept = torch.empty(weight.shape[0], count, dtype=ctx.low, device=hidden.device) if keeps else None
        with torch.autocast(kind, enabled=False):
            for rows in _chunks(count, chunk_size):
                states = _states(hidden[rows], temperature, ctx.low)
                shift = _shift(states, weight)
                for i, block in enumerate(blocks):
                    room = None if kept is None else kept[block]
                    logits = _block_logits(states, shift, weight, bias, block, temperature, room)
                    place, inside = _places(tokens[rows], block)
                    chosen[rows] = torch.where(inside, logits.gather(0, place)[0], chosen[rows])
                    # A block of banned tokens has no largest logit to subtract.
                    largest = logits.amax(dim=0).clamp_(min=torch.finfo(ctx.low).min)
                    maxima[i, rows] = largest.to(dtype)
                    logits.sub_(largest)
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
        dtype, device, temperature = normaliser.dtype, hidden.device, ctx.temperature
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Sums over blocks and chunks are kept in the compute dtype and rounded once.
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=device) if needs_hidden else None
        grad_weight = torch.empty(weight.shape, dtype=dtype, device=device) if needs_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=dtype, device=device) if needs_bias else None
        if grad_weight is not None and not hidden.shape[0]:
            grad_weight.zero_()  # no block will write to it
        # What was kept is overwritten below, so a second backward pass (retain_graph) computes it again.
        kept, ctx.kept = ctx.kept, None
        for rows in _chunks(hidden.shape[0], ctx.chunk_size):
            states = _states(hidden[rows], temperature, ctx.low)
            shift = _shift(states, weight) if kept is None else None
            upstream, scale = grad_logprobs[rows].to(dtype), grad_entropy[rows].to(dtype)
            missing = torch.ones_like(upstream)
            for i, block in enumerate(ctx.blocks):
                if kept is None:
                    logits = _block_logits(states, shift, weight, bias, block, temperature)
                    e = logits.sub_(maxima[i, rows].to(ctx.low)).exp_()
                else:
                    e = kept[block]
                share = (maxima[i, rows] - normaliser[rows]).exp_()
                # d logprob / d logit = onehot - p; d entropy / d logit = -p * (log p + entropy); p = e * share.
                # The chosen token's 1 - p is ``missing``: apart, it loses nothing to rounding.
                slope = None
                if ctx.return_entropy:
                    p = e.to(dtype) * share
                    # Far below the log of any p above 0, and small enough that no scale makes 0 * inf of it.
                    slope = p.mul_(scale * (p.log().clamp_(min=-1e4) + entropy[rows]))
                place, inside = _places(tokens[rows], block)
                of_token = e.gather(0, place)
                missing.sub_(of_token[0] * share * inside)
                e.scatter_(0, place, of_token.masked_fill_(inside, 0))
                factor = -upstream * share
                if slope is not None:
                    e, factor = slope.add_(e * -factor).to(ctx.low), torch.full_like(factor, -1.0)
                if grad_bias is not None:
                    grad_bias[block] += (e.to(dtype) @ factor) / temperature
                if grad_hidden is not None:
                    product = e.T @ weight[block].to(ctx.low)
                    grad_hidden[rows] += product.to(dtype).mul_((factor / temperature)[:, None])
                if grad_weight is not None:
                    _add_product(grad_weight[block], e, (states * factor).to(ctx.low).T, first=rows.start == 0)
            missing.mul_(upstream / temperature)
            if grad_bias is not None:
                grad_bias.index_put_((tokens[rows],), missing, accumulate=True)
            if grad_hidden is not None:
                grad_hidden[rows].addcmul_(missing[:, None], weight[tokens[rows]])
            if grad_weight is not None:
                grad_weight.index_put_((tokens[rows],), missing[:, None] * hidden[rows].to(dtype), accumulate=True)
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


def _states(hidden: Tensor, temperature: float, low: torch.dtype) -> Tensor:
    """[n, O] -> [O, n] in the format of the products, divided by the temperature before it is rounded."""
    return (hidden if temperature == 1 else hidden / temperature).to(low).T


def _block_logits(
    states: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    block: slice,
    temperature: float,
    room: Tensor | None = None,
) -> Tensor:
    """Logits [block, n] less the ``shift``, in the format of states [O, n]; written into ``room`` if given."""
    words = weight[block].to(states.dtype)
    # addmm shifts before it rounds.
    logits = torch.mm(words, states, out=room) if shift is None else torch.addmm(-shift, words, states, out=room)
    return logits if bias is None else logits.add_((bias[block, None] / temperature).to(states.dtype))


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
        shift = _shift(states, weight)
        logits = _block_logits(states, shift, weight, bias, slice(0, weight.shape[0]), 1.0).to(compute_dtype(hidden))
        return (logits if shift is None else logits.add_(shift)).T


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
