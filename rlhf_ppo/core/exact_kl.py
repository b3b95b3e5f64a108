"""Exact KL to the reference: over the whole vocabulary at each position, from logits or from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from rlhf_ppo.core.logprobs import CHUNK_LOGITS
from rlhf_ppo.core.types import compute_dtype, require_same_shape, require_temperature, result_dtype


def kl_from_logits(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``KL(pi || ref) = sum_v p_v (log p_v - log q_v)`` of two softmax distributions.

    Args:
        logits: [*, V] the policy's, with gradients; -inf bans a token, which then adds nothing.
        ref_logits: [*, V] the reference's.
        temperature: divides both.
    Returns:
        [*] nats; infinite where the reference bans a token that the policy does not.
    Raises:
        ValueError: shapes differ, or temperature is not positive.
    """
    require_same_shape(logits=logits, ref_logits=ref_logits)
    require_temperature(temperature)
    dtype = compute_dtype(logits)
    log_p, log_q = ((x.to(dtype) / temperature).log_softmax(dim=-1) for x in (logits, ref_logits))
    # A banned token has probability 0; what it would multiply must not be infinite, forward or backward.
    banned = log_p == -torch.inf
    difference = log_p.masked_fill(banned, 0.0) - log_q.masked_fill(banned, 0.0)
    return (log_p.exp() * difference).sum(dim=-1).to(result_dtype(logits))


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
) -> Tensor:
    """:func:`kl_from_logits` of ``hidden @ weight.T + bias`` against the reference's, without the [N, V] logits.

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
    ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
    ref_bias = None if ref_bias is None else ref_bias.detach()

    def of_rows(rows: slice) -> Tensor:
        logits, ref_logits = linear(hidden[rows], weight, bias), linear(ref_hidden[rows], ref_weight, ref_bias)
        return kl_from_logits(logits, ref_logits, temperature=temperature)

    if len(hidden) <= chunk_size:
        return of_rows(slice(None)).to(result_dtype(hidden))
    again = cast(Callable[..., Tensor], checkpoint)  # torch leaves it untyped
    starts = range(0, len(hidden), chunk_size)
    chunks = [again(of_rows, slice(i, i + chunk_size), use_reentrant=False, preserve_rng_state=False) for i in starts]
    return torch.cat(chunks).to(result_dtype(hidden))
