"""Plain stand-ins for torch's attention kernel over packed sequences, with the signature of each version."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ppo.models.forward import packing, varlen


def plain(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
    """Attend to the tokens so far of the same sequence: one [N, N] mask over the whole row."""
    assert bounds.dtype == torch.int32 and type(longest) is int
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    place = torch.arange(len(query), device=query.device)
    owner = (place[:, None] >= bounds).sum(dim=1)
    seen = (owner[:, None] == owner) & (place[:, None] >= place) & (place[:, None] - place < longest)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[2] ** -0.5 if scale is None else scale)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), value)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal and cu_seq_q is cu_seq_k and query.shape[1] == key.shape[1]
    return plain(query, key, value, cu_seq_q, max_q, None)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and query.shape[1] == key.shape[1]
    return plain(query, key, value, cu_seq_q, max_q, scale)


def torch_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and (enable_gqa or query.shape[1] == key.shape[1])
    return plain(query, key, value, cu_seq_q, max_q, scale)


def as_on_a_gpu(patch: pytest.MonkeyPatch, kernel: Any = torch_2_13) -> list[int]:
    """Attend within packed sequences by a kernel whatever the device; returns a list that grows with each call."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(args[0]))
        return kernel(*args, **kwargs)

    accepted = varlen._parameters(kernel)
    patch.setattr(varlen, "_parameters", lambda _: accepted)
    patch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    patch.setattr(packing, "kernel_dtype", lambda query: query.dtype)
    patch.setattr(varlen, "_require_right", cache(varlen._require_right.__wrapped__))
    return calls
