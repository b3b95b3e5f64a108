"""Messages: what processes send each other, packed as safetensors or in buckets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

_TEXT = "message"
_BUCKET = 2**25
"""Bytes of gradients that are summed in one go."""


def pack(tensors: Mapping[str, Tensor], text: str) -> Tensor:
    """Pack tensors by name and a JSON text into bytes [n]."""
    return _bytes(save({**{n: x.contiguous() for n, x in tensors.items()}, _TEXT: _bytes(text.encode())}))


def unpack(sent: Tensor) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors, and what the JSON text says, of bytes [n] that :func:`pack` made."""
    named = load(sent.numpy().tobytes())
    return named, json.loads(named.pop(_TEXT).numpy().tobytes().decode())


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors of one dtype, in order, into buckets of about ``_BUCKET`` bytes."""
    found: list[list[Tensor]] = []
    size = _BUCKET
    for x in tensors:
        if size >= _BUCKET or found[-1][0].dtype != x.dtype:
            found.append([])
            size = 0
        found[-1].append(x)
        size += x.nbytes
    return found
