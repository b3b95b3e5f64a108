"""Attention within sequences that lie end to end in one row, so that nothing computes on padding; token batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_ppo.models.forward.plain_attention import plain_attention
from rlhf_ppo.models.forward.varlen import causal_attention, kernel_dtype
from rlhf_ppo.runtime.machine.transfers import from_host

_PACKED: ContextVar[tuple[PretrainedConfig, Packing] | None] = ContextVar("packed", default=None)


@dataclass(frozen=True, eq=False)
class Packing:
    """Sequences end to end in one row."""

    lengths: tuple[int, ...]
    """Tokens of each, in their order in the row."""
    device: torch.device

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(length, number of sequences) of each run of sequences of equal length."""
        return [(length, len(list(same))) for length, same in groupby(self.lengths)]

    @cached_property
    def bounds(self) -> Tensor:
        """[B + 1] int32 where each begins, and where the last one ends."""
        return from_host(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32), self.device)


@contextmanager
def packed_attention(config: PretrainedConfig, packing: Packing) -> Iterator[None]:
    """Let models with this config attend only within each of the packed sequences."""
    before = config._attn_implementation
    token = _PACKED.set((config, packing))
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
    """Attend within each packed sequence, [1, H, N, D] -> [1, N, H, D]: by one kernel where there is one."""
    packed = _PACKED.get()
    assert packed is not None
    if (dtype := kernel_dtype(query)) is None:
        return _attend_by_length(module, query, key, value, packed[1], **kwargs), None
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("the attention kernel for packed sequences takes no bias")
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    packing = packed[1]
    return causal_attention(q, k, v, packing.bounds, max(packing.lengths), kwargs.get("scaling"))[None], None


def _attend_by_length(
    module: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, **kwargs: Any
) -> Tensor:
    """Call transformers' sdpa attention once for each run of sequences of equal length."""
    sizes = [length * count for length, count in packing.runs]
    unusual = kwargs.get("position_bias") is not None or kwargs.get("dropout")
    outputs: list[Tensor] = []
    for (length, count), q, k, v in zip(
        packing.runs, query.split(sizes, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True
    ):
        q, k, v = (x[0].unflatten(1, (count, length)).transpose(0, 1) for x in (q, k, v))
        if value.dtype == torch.bfloat16 and length <= 1024 and not unusual:
            output = plain_attention(q, k, v, kwargs.get("scaling"))
        else:
            output, _ = sdpa_attention_forward(module, q, k, v, None, **{**kwargs, "is_causal": True})
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None]


AttentionInterface.register("rlhf_ppo_packed", _attend)


def exclude_from_compilation() -> None:
    """Let torch.compile leave packed attention as it is: it depends on the lengths, which no tensor holds."""
    AttentionInterface.register("rlhf_ppo_packed", torch.compiler.disable(_attend))


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
