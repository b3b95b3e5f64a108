"""Log-probs and entropy of token distributions, from their logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_ppo.core.kernels.vocabulary_blocks import below_largest, blocks_of, places_in
from rlhf_ppo.core.types import compute_dtype, require_same_shape, require_temperature, require_token_ids, result_dtype


def token_logprobs(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Compute ``log softmax(logits / temperature)[token]``.

    Args:
        logits: [*, V] unnormalised log-probabilities; -inf bans a token.
        tokens: [*] integer ids below V.
        temperature: divides the logits; the one used for sampling.
        dtype: of the result; default: the logits'. float32 log-probs need no float32 copy of bfloat16 logits.
    Returns:
        [*] log-probs in nats.
    Raises:
        ValueError: shapes do not fit, temperature is not positive, or (on CPU) an id is out of range.
    """
    if logits.ndim == 0:
        raise ValueError("logits must be [*, V], got a scalar")
    require_same_shape(tokens=tokens, logits_without_vocabulary=logits[..., 0])
    require_temperature(temperature)
    require_token_ids(tokens, logits.shape[-1])
    apply = cast(Callable[..., Tensor], _TokenLogprobs.apply)  # torch leaves apply untyped
    return apply(logits, tokens.long(), temperature).to(dtype or result_dtype(logits))


class _TokenLogprobs(torch.autograd.Function):
    """Allocates nothing as large as the logits but their gradient; works on blocks of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        words, flat = logits.reshape(-1, logits.shape[-1]).T, tokens.flatten()  # [V, N]
        dtype = compute_dtype(logits)
        blocks = blocks_of(words.shape[0], words.shape[1], logits.device)
        maxima, totals = (torch.empty(len(blocks), len(flat), dtype=dtype, device=logits.device) for _ in range(2))
        for i, block in enumerate(blocks):
            part, maxima[i] = below_largest(_scaled(words[block], temperature, dtype))
            totals[i] = part.exp_().sum(dim=0)
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
            place, inside = places_in(tokens, block)
            grad[block] = part.scatter_add_(0, place, torch.where(inside, upstream, 0.0)[None])
        return grad.T.reshape(logits.shape), None, None


def _scaled(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Return ``logits / temperature`` as a new tensor in ``dtype``."""
    logits = logits.to(dtype, copy=True)
    return logits if temperature == 1 else logits.div_(temperature)


def entropy_from_logits(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the entropy of ``softmax(logits / temperature)`` in nats: [*, V] -> [*]; banned tokens (-inf) add 0."""
    require_temperature(temperature)
    log_p = (logits.to(compute_dtype(logits)) / temperature).log_softmax(dim=-1)
    return _entropy(log_p).to(result_dtype(logits))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=-1)
