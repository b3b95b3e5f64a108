"""Pack prompts with responses end to end in one row, so that no model computes on padding; batches by token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_PACKED: ContextVar[tuple[PretrainedConfig, tuple[int, ...]] | None] = ContextVar("packed", default=None)


@dataclass(frozen=True)
class Packed:
    """B sequences of N tokens in all, as one row; those of equal length are neighbours."""

    ids: Tensor
    """[1, N] token ids."""
    positions: Tensor
    """[1, N] positions, from 0 in each sequence."""
    lengths: tuple[int, ...]
    """[B] tokens of each sequence, in packed order."""
    index: Tensor
    """[n] where the states before the n True response tokens are, in the order of ``response_ids[mask]``."""


def pack(
    prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor, real: Tensor | None = None
) -> Packed:
    """Pack prompts [B, P] and responses [B, T]; the last token of a response is never an input.

    ``real`` [B, T] is True on other speakers' tokens too; None: there are none.
    """
    ids = torch.cat([prompt_ids, response_ids[:, :-1]], dim=1)
    # A token is an input where another follows it.
    real = torch.cat([prompt_mask, (mask if real is None else real)[:, 1:]], dim=1)
    lengths, order = real.sum(dim=1).sort()
    ids, real = ids[order], real[order]
    place = real.flatten().cumsum(0).view_as(real) - 1
    unsorted = torch.empty_like(place)
    unsorted[order] = place
    before = unsorted[:, prompt_ids.shape[1] - 1 :]  # the state before response token t, for every t
    positions = real.cumsum(dim=1) - 1
    return Packed(ids[real][None], positions[real][None], tuple(lengths.tolist()), before[mask])


def align(
    prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Left-align each prompt [B, P] with its response [B, T], so that all padding comes last.

    Arguments are those of :func:`pack`.

    Returns:
        Token ids [B, P + T - 1], and the flat index [B, T] of the state before each response token.
    """
    ids = torch.cat([prompt_ids, response_ids[:, :-1]], dim=1)
    real = torch.cat([prompt_mask, (mask if real is None else real)[:, :-1]], dim=1)
    ids = ids.gather(1, (~real).byte().argsort(dim=1, stable=True))
    rows = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
    before = real.cumsum(dim=1)[:, prompt_ids.shape[1] - 1 :] - 1
    return ids, rows + before


@contextmanager
def packed_attention(config: PretrainedConfig, lengths: tuple[int, ...]) -> Iterator[None]:
    """Let models with this config attend only within each of the packed sequences."""
    before = config._attn_implementation
    token = _PACKED.set((config, lengths))
    config._attn_implementation = "rlhf_ppo_packed"
    try:
        yield
    finally:
        config._attn_implementation = before
        _PACKED.reset(token)


def current_packing() -> AbstractContextManager[None]:
    """Return a context manager that restores the current packed attention later, to recompute activations."""
    packed = _PACKED.get()
    return nullcontext() if packed is None else packed_attention(*packed)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any) -> Any:
    """Call transformers' sdpa attention [1, H, N, D] once for each run of sequences of equal length."""
    packed = _PACKED.get()
    assert packed is not None
    runs = [(length, len(list(same))) for length, same in groupby(packed[1])]
    sizes = [length * count for length, count in runs]
    outputs: list[Tensor] = []
    for (length, count), q, k, v in zip(
        runs, query.split(sizes, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True
    ):
        q, k, v = (x[0].unflatten(1, (count, length)).transpose(0, 1) for x in (q, k, v))
        # In bfloat16 on CPU the fused kernel's backward pass takes three times as long as plain products.
        plain = query.dtype == torch.bfloat16 and torch.is_grad_enabled() and length <= 1024
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            output, _ = sdpa_attention_forward(module, q, k, v, None, **{**kwargs, "is_causal": True})
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


AttentionInterface.register("rlhf_ppo_packed", _attend)


def token_batches(lengths: Sequence[int], max_tokens: int, *, padded: bool) -> list[list[int]]:
    """Group rows, sorted by length, into batches of at most ``max_tokens`` tokens each (or a single row).

    Args:
        lengths: tokens of each row.
        max_tokens: most tokens per batch.
        padded: count every row of a batch as its longest.
    Returns:
        Indices into ``lengths``; every row is in exactly one batch.
    """
    batches: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Rows come in order of length, so the newest is the longest of its batch.
        together = lengths[row] * (len(batches[-1]) + 1) if batches and padded else tokens + lengths[row]
        if not batches or together > max_tokens:
            batches.append([])
            together = lengths[row]
        batches[-1].append(row)
        tokens = together
    return batches
