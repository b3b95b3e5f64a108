"""Minibatches: shuffled index sets that cover a rollout once."""

from __future__ import annotations

import torch
from torch import Tensor


def minibatch_indices(
    size: int, num_minibatches: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Shuffle ``range(size)`` and split it into ``num_minibatches`` parts whose sizes differ by at most one.

    Args:
        size: number of rows (responses) or steps.
        num_minibatches: number of parts, each one optimizer step.
        generator: source of the shuffle, for repeatable runs.
        device: device of the indices.
    Raises:
        ValueError: there are more minibatches than rows, so that one would be empty.
    """
    if not 1 <= num_minibatches <= size:
        raise ValueError(f"{size} rows cannot fill num_minibatches={num_minibatches}; use between 1 and {size}")
    return list(torch.randperm(size, generator=generator).to(device).tensor_split(num_minibatches))
