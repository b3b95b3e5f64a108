"""Packing: prompts with responses laid end to end in one row, so that no model ever computes on padding."""

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
    """B sequences of N tokens in all, as one row; equally long ones lie side by side."""

    ids: Tensor
    """[1, N] token ids."""
    positions: Tensor
    """[1, N] positions, from 0 in each sequence."""
    lengths: tuple[int, ...]
    """[B] tokens of each sequence, in the order in which they lie."""
    index: Tensor
    """[n] where the state before each of the n True response tokens lies, in the order of ``response_ids[mask]``."""


def pack(
    prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor, real: Tensor | None = None
) -> Packed:
    """Lay prompts [B, P] and responses [B, T] end to end; the last token of a response is never an input.

    ``real`` [B, T] is True on the tokens of other speakers too; None: there are none, and ``mask`` says it all.
    """
    ids = torch.cat([prompt_ids, response_ids[:, :-1]], dim=1)
    # A token is read where another follows it.
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
    """Lay each prompt [B, P] and its response [B, T] from column 0 on, so that all padding lies behind them.

    Arguments are those of :func:`pack`.

    Returns:
        Token ids [B, P + T - 1], and where in these, flattened, the state before each response token lies [B, T].
    """
    ids = torch.cat([prompt_ids, response_ids[:, :-1]], dim=1)
    real = torch.cat([prompt_mask, (mask if real is None else real)[:, :-1]], dim=1)
    ids = ids.gather(1, (~real).byte().argsort(dim=1, stable=True))
    rows = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
    before = real.cumsum(dim=1)[:, prompt_ids.shape[1] - 1 :] - 1
    return ids, rows + before


@contextmanager
def packed_attention(config: PretrainedConfig, lengths: tuple[int, ...]) -> Iterator[None]:
    """While this lasts, models with this config attend within each of the packed sequences and to nothing else."""
    before = config._attn_implementation
    token = _PACKED.set((config, lengths))
    config._attn_implementation = "rlhf_ppo_packed"
    try:
        yield
    finally:
        config._attn_implementation = before
        _PACKED.reset(token)


def same_packing() -> AbstractContextManager[None]:
    """Whatever :func:`packed_attention` has set now, for computing the same again at another time."""
    packed = _PACKED.get()
    return nullcontext() if packed is None else packed_attention(*packed)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any) -> Any:
    """transformers' own sdpa attention, one call for each run of equally long sequences: [1, H, N, D] each."""
    packed = _PACKED.get()
    assert packed is not None
    runs = [(length, len(list(same))) for length, same in groupby(packed[1])]
    sizes = [length * count for length, count in runs]
    outputs: list[Tensor] = []
    for (length, count), q, k, v in zip(
        runs, query.split(sizes, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True
    ):
        q, k, v = (x[0].unflatten(1, (count, length)).transpose(0, 1) for x in (q, k, v))
        # In bfloat16 the backward pass of the fused kernel takes three times as long on CPU as plain products.
        plain = query.dtype == torch.bfloat16 and torch.is_grad_enabled() and length <= 1024
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            output, _ = sdpa_attention_forward(module, q, k, v, None, **{**kwargs, "is_causal": True})
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


AttentionInterface.register("rlhf_ppo_packed", _attend)


def token_batches(lengths: Sequence[int], max_tokens: int, *, padded: bool) -> list[list[int]]:
    """Rows in groups of at most ``max_tokens`` tokens each (or a single row), sorted by length.

    Args:
        lengths: tokens of each row.
        max_tokens: most tokens of a group.
        padded: count every row of a group as long as its longest.
    Returns:
        Indices into ``lengths``; every row is in exactly one group.
    """
    groups: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Rows come in order of length, so the newest is the longest of its group.
        together = lengths[row] * (len(groups[-1]) + 1) if groups and padded else tokens + lengths[row]
        if not groups or together > max_tokens:
            groups.append([])
            together = lengths[row]
        groups[-1].append(row)
        tokens = together
    return groups
