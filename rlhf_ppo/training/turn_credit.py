"""Turn-level credit: a conversation seen as one action per turn, and the way back to its tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def to_turns(rewards: Tensor, values: Tensor, turns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask [B, K] of turns from those of tokens [B, T].

    A turn's reward is the sum of its tokens' rewards; its value is the critic's before its first token, where all that
    the turn will be is still to be decided.

    Args:
        turns: [B, T] long, the number of each token's turn, from 0.
        mask: [B, T] bool, True on tokens that the policy chose.
    Source: the decision process over turns of Li et al., "Turn-PPO" (2025). That this critic is the token critic, read
    at the turn's first token, is our choice.
    """
    number, count = torch.where(mask, turns, 0), int(turns.max()) + 1
    nothing = torch.zeros_like(rewards[:, :1]).expand(-1, count)
    summed = nothing.scatter_add(1, number, torch.where(mask, rewards, 0))
    steps = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    never = torch.full_like(number[:, :1], mask.shape[1]).expand(-1, count)
    first = never.scatter_reduce(1, number, torch.where(mask, steps, mask.shape[1]), "amin")
    taken = first < mask.shape[1]
    before = values.gather(1, torch.where(taken, first, 0))
    return summed, torch.where(taken, before, 0), taken


def to_tokens(x: Tensor, turns: Tensor, mask: Tensor) -> Tensor:
    """Each token's share [B, T] of what its turn has [B, K]: the same for all of them, 0 outside ``mask``."""
    return torch.where(mask, x.gather(1, torch.where(mask, turns, 0)), 0)
