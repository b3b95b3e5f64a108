"""What several test files need, imported by name; fixtures are in the conftest files."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils._pytree import tree_map


def f64(x: Any) -> torch.Tensor:
    """Return numbers as a float64 tensor, in which closed forms hold to default tolerances."""
    return torch.tensor(x, dtype=torch.float64)


def moved(record: Any, device: str) -> Any:
    """Return a dataclass with all of its tensors on a device."""

    def move(x: Any) -> Any:
        return x.to(device) if isinstance(x, torch.Tensor) else x

    fields = {f.name: tree_map(move, getattr(record, f.name)) for f in dataclasses.fields(record)}
    return dataclasses.replace(record, **fields)


def seeded(seed: int = 3) -> torch.Generator:
    """Return a generator of random numbers on the CPU."""
    return torch.Generator().manual_seed(seed)
