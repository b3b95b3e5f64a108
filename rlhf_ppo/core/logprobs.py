"""Log-probs of chosen tokens, from logits or straight from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_ppo.core.types import compute_dtype, require_same_shape, result_dtype

CHUNK_LOGITS = 2**25
"""Most logits that linear_logprobs holds at once unless told otherwise: 128 MiB in float32."""


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)[token]``.

    Args:
        logits: [*, V] unnormalised log-probabilities; -inf bans a token.
        tokens: [*] integer ids below V.
        temperature: divides the logits; the same one as at sampling.
    Returns:
        [*] log-probs in nats.
    Raises:
        ValueError: shapes do not fit, temperature is not positive, or (on CPU) an id is out of range.
    """
    if logits.ndim == 0:
        raise ValueError("logits must be [*, V], got a scalar")
    require_same_shape(tokens=tokens, logits_without_vocabulary=logits[..., 0])
    _check_temperature(temperature)
    _check_ids(tokens, logits.shape[-1])
    apply = cast(Callable[..., Tensor], _TokenLogprobs.apply)  # torch leaves apply untyped
    return apply(logits, tokens.long(), temperature).to(result_dtype(logits))


class _TokenLogprobs(torch.autograd.Function):
    """Keeps one [*, V] tensor, the softmax, between forward and backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        scaled = logits.to(compute_dtype(logits), copy=True)
        if temperature != 1:
            scaled.div_(temperature)
        chosen = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        p, normaliser = softmax_(scaled)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(p, tokens)
        return chosen - normaliser

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (once_differentiable makes ctx positional)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        p, tokens = ctx.saved_tensors
        # d logprob / d logit = (onehot - p) / temperature
        upstream = (grad_outputs[0] / ctx.temperature).unsqueeze(-1)
        grad = (-upstream * p).scatter_add_(-1, tokens.unsqueeze(-1), upstream)
        return grad.to(ctx.dtype), None, None


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
    _check_temperature(temperature)
    _check_ids(tokens, weight.shape[0])
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _LinearLogprobs.apply)  # torch leaves apply untyped
    logprobs, entropy = apply(hidden, weight, bias, tokens.long(), temperature, chunk_size, return_entropy)
    return (logprobs, entropy) if return_entropy else logprobs


class _LinearLogprobs(torch.autograd.Function):
    """Forward keeps the softmax of a single chunk; of several, one log-normaliser a row, and backward rebuilds them."""

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
        dtype = compute_dtype(hidden)
        logprobs = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        entropy, normaliser = torch.zeros_like(logprobs), torch.empty_like(logprobs)
        p: Tensor | None = None
        for rows in _chunks(hidden.shape[0], chunk_size):
            logits = project(hidden[rows], weight, bias, temperature)
            chosen = logits.gather(-1, tokens[rows, None]).squeeze(-1)
            if return_entropy:
                normaliser[rows] = logits.logsumexp(dim=-1)
                entropy[rows] = _entropy(logits.sub_(normaliser[rows, None]))
                p = logits.exp_()
            else:
                p, normaliser[rows] = softmax_(logits)
            logprobs[rows] = chosen - normaliser[rows]
        ctx.save_for_backward(hidden, weight, bias, tokens, normaliser, entropy)
        ctx.p = p if hidden.shape[0] <= chunk_size and any(ctx.needs_input_grad[:3]) else None
        ctx.temperature, ctx.chunk_size, ctx.return_entropy = temperature, chunk_size, return_entropy
        kind = hidden.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return logprobs.to(hidden.dtype), entropy.to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (once_differentiable makes ctx positional)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grad_outputs
        hidden, weight, bias, tokens, normaliser, entropy = ctx.saved_tensors
        dtype = normaliser.dtype
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Sums over all chunks are kept in the compute dtype and rounded once.
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        # The kept softmax is overwritten below, so a second backward pass (retain_graph) computes it again.
        kept, ctx.p = ctx.p, None
        for rows in _chunks(hidden.shape[0], ctx.chunk_size):
            if kept is None:
                with torch.autocast(ctx.autocast[0], dtype=ctx.autocast[1], enabled=ctx.autocast[2]):  # as it was
                    logits = project(hidden[rows], weight, bias, ctx.temperature)
                p = logits.sub_(normaliser[rows, None]).exp_()
            else:
                p = kept
            # d logprob / d logit = onehot - p;   d entropy / d logit = -p * (log p + entropy)
            upstream = grad_logprobs[rows, None].to(dtype) / ctx.temperature
            if ctx.return_entropy:
                # Far below the log of any p above 0, and small enough that no scale makes 0 * inf of it where p is 0.
                finite_log_p = p.log().clamp_(min=-1e4)
                scale = grad_entropy[rows, None].to(dtype) / ctx.temperature
                grad_logits = p.mul_(-upstream - scale * (finite_log_p + entropy[rows, None]))
            else:
                grad_logits = p.mul_(-upstream)
            grad_logits.scatter_add_(-1, tokens[rows, None], upstream)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ weight.to(dtype)).to(hidden.dtype)
            if needs_weight:
                transposed, states = grad_logits.T, hidden[rows].to(dtype)
                grad_weight = transposed @ states if grad_weight is None else grad_weight.addmm_(transposed, states)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
        if needs_weight and grad_weight is None:  # no rows at all
            grad_weight = torch.zeros_like(weight)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax in place over the last axis: (probabilities [*, V] in the logits' own memory, log-normaliser [*])."""
    largest = logits.amax(dim=-1, keepdim=True)
    p = logits.sub_(largest).exp_()
    total = p.sum(dim=-1, keepdim=True)
    return p.div_(total), (largest + total.log()).squeeze(-1)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    """``(hidden @ weight.T + bias) / temperature`` as a new [N, V] tensor, in float32 or wider; without gradients."""
    # On CPU the product is up to twice as fast with the vocabulary as rows; only the strides differ.
    logits = (weight @ hidden.T).T if hidden.device.type == "cpu" else hidden @ weight.T
    dtype = compute_dtype(hidden)
    logits = logits.to(dtype)
    if bias is not None:
        logits = logits.add_(bias.to(dtype))
    return logits if temperature == 1 else logits.div_(temperature)


def entropy_from_logits(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of ``softmax(logits / temperature)``: [*, V] -> [*]; banned tokens (-inf) add nothing."""
    _check_temperature(temperature)
    log_p = (logits.to(compute_dtype(logits)) / temperature).log_softmax(dim=-1)
    return _entropy(log_p).to(result_dtype(logits))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=-1)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


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
