"""Minibatches: shuffled index sets that cover a rollout once."""

from __future__ import annotations

import torch
from torch import Tensor


def minibatch_indices(
    size: int, num_minibatches: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """A fresh permutation of ``range(size)`` in ``num_minibatches`` parts whose sizes differ by at most one.

    Args:
        size: rows (responses) or steps to share out.
        num_minibatches: number of parts, each one optimizer step.
        generator: source of the shuffle, for repeatable runs.
        device: where the indices are needed.
    Raises:
        ValueError: there are more minibatches than rows, so that one would be empty.
    """
    if not 1 <= num_minibatches <= size:
        raise ValueError(f"{size} rows cannot fill num_minibatches={num_minibatches}; use between 1 and {size}")
    return list(torch.randperm(size, generator=generator).to(device).tensor_split(num_minibatches))
