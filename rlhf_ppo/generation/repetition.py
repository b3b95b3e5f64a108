"""Repetition: how much of a response repeats itself, and how different the responses of a rollout are."""

from __future__ import annotations

import torch
from torch import Tensor

_END = torch.iinfo(torch.int64).max
_BASE = 1_000_003
"""Mixes the ids of a run of tokens into one number; two runs that get the same are too rare to matter."""


def repeated_fraction(ids: Tensor, mask: Tensor, n: int = 4) -> Tensor:
    """Compute each response's share of runs of n consecutive tokens that occurred in it before.

    0 is a response that never repeats itself; one that says a single token again and again comes close to 1.

    Args:
        ids: [B, T] tokens.
        mask: [B, T] bool, True where they count; a run does not reach across a gap.
    Returns:
        [B] float; 0 for a response of fewer than n tokens.
    Source: Welleck et al., "Neural Text Generation with Unlikelihood Training" (2020), seq-rep-4.
    """
    runs, valid = _runs(ids, mask, n)
    distinct = _count_distinct(runs, valid)
    total = valid.sum(dim=-1)
    return (1 - distinct / total.clamp(min=1)).masked_fill(total == 0, 0.0)


def distinct_fraction(ids: Tensor, mask: Tensor, n: int = 2) -> float:
    """Compute the share of distinct ones among all runs of n consecutive tokens in a rollout; 0 without any.

    It falls as responses become alike. Compare only rollouts of about the same number of tokens: it also falls as more
    text is counted.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models" (2016), distinct-n.
    """
    runs, valid = _runs(ids, mask, n)
    total = int(valid.sum())
    return float(_count_distinct(runs.flatten(), valid.flatten())) / total if total else 0.0


def _runs(ids: Tensor, mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return a number for each run of n tokens [B, T - n + 1], and whether all of them count."""
    length = max(ids.shape[-1] - n + 1, 0)
    runs = torch.zeros(ids.shape[0], length, dtype=torch.int64, device=ids.device)
    valid = torch.ones_like(runs, dtype=torch.bool)
    for i in range(n):
        runs = runs * _BASE + ids[:, i : i + length] + 1
        valid &= mask[:, i : i + length]
    return runs, valid


def _count_distinct(runs: Tensor, valid: Tensor) -> Tensor:
    """Count the distinct valid numbers over the last axis."""
    ordered = runs.masked_fill(~valid, _END).sort(dim=-1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return (first & (ordered != _END)).sum(dim=-1)
