"""Draws: sample tokens from exactly softmax(logits / temperature) by inverting the cumulative distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_ppo.runtime.seeding import TURNS, numbered_generator

_BLOCK = 256


class RowsOf(NamedTuple):
    """Which rows of a rollout are sampled here: their draws are those that they get when all are sampled together."""

    rows: Sequence[int]
    count: int
    """Rows of the whole rollout."""
    turns: Sequence[int] | None = None
    """Which turn of its conversation each row samples, from 0; None: there is one, and nothing to number."""


def uniforms(
    steps: int, rows: int, generator: torch.Generator | None, device: torch.device, whole: RowsOf | None = None
) -> Tensor:
    """Draw uniform numbers in [0, 1), [steps, rows], in float64 where the device has it.

    All draws of a rollout are made before it starts, so a row's draws do not depend on when other rows end.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return draw_by_row(
        lambda n, source: torch.rand(steps, n, generator=source, dtype=dtype, device=device), rows, generator, whole
    )


def draw_by_row(
    draw: Callable[[int, torch.Generator | None], Tensor],
    rows: int,
    generator: torch.Generator | None,
    whole: RowsOf | None = None,
) -> Tensor:
    """Draw for rows of a rollout what each gets when all are drawn together.

    Each turn of a conversation has draws of its own, numbered by the turn, so they do not depend on which turns were
    sampled before or together with it; the generator then only says which rollout this is, and does not advance.

    Args:
        draw: (number of rows n, generator) -> [..., n].
        rows: how many there are.
        generator: source of randomness.
        whole: which rows they are; None: all.
    Returns:
        [..., rows]
    """
    if whole is None:
        return draw(rows, generator)
    if whole.turns is None:
        drawn = draw(whole.count, generator)
        return drawn[..., torch.tensor(whole.rows, dtype=torch.long, device=drawn.device)]
    assert generator is not None
    seed, device = generator.initial_seed(), generator.device
    of_turn = {t: draw(whole.count, numbered_generator(seed, TURNS, t, device)) for t in sorted(set(whole.turns))}
    return torch.stack([of_turn[t][..., row] for t, row in zip(whole.turns, whole.rows, strict=True)], dim=-1)


def sample_from_logits(
    logits: Tensor, u: Tensor, temperature: float, banned: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token a row from softmax(logits / temperature) without the ``banned`` tokens.

    Args:
        logits: [B, V]; overwritten.
        u: [B] uniform in [0, 1), one draw a row.
        temperature: divides the logits.
        banned: rows [B] bool, True where ids [n] get probability 0, which the others share; None: nowhere.
    Returns:
        Tokens, their log-probs, and the entropies in nats of the distributions drawn from: all [B].
    """
    if banned is not None:
        where, ids = banned
        logits.index_copy_(1, ids, logits[:, ids].masked_fill(where[:, None], -math.inf))
    if temperature != 1:
        logits.div_(temperature)
    # Banned tokens (-inf) become finite, but far below anything whose exponential is not 0.
    logits.sub_(logits.amax(dim=-1, keepdim=True)).clamp_(min=-1e4)
    weights = logits.exp()
    total = weights.sum(dim=-1)
    tokens = draw(weights, u)
    logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - total.log()
    return tokens, logprobs, total.log() - weights.mul_(logits).sum(dim=-1) / total


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Return the tokens at which the cumulative weights pass ``u`` of their total (inverse transform sampling).

    Blocks of the vocabulary are searched first, then the tokens of one block. The running sums are kept in float64
    (where the device has it), so that tokens of tiny probability keep it.

    Args:
        weights: [B, V], not negative; a token of weight 0 is never drawn.
        u: [B] uniform in [0, 1), of the dtype in which to sum.
    Returns:
        [B] token ids.
    """
    vocabulary = weights.shape[1]
    whole = vocabulary // _BLOCK * _BLOCK
    sums = [weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(dim=-1), weights[:, whole:].sum(dim=-1, keepdim=True)]
    blocks = torch.cat(sums, dim=1).to(u.dtype).cumsum(dim=-1)
    place = _below(u[:, None] * blocks[:, -1:], blocks[:, -1:])
    # right=True finds the first entry above the place, whose own weight is therefore not 0.
    block = torch.searchsorted(blocks, place, right=True)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), torch.zeros_like(place))
    tokens = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, tokens.clamp(max=vocabulary - 1)).to(u.dtype)
    inside = torch.where(tokens < vocabulary, inside, torch.zeros_like(inside)).cumsum(dim=-1)
    # Blocks were summed in the weights' own precision: the share of a block carries over exactly, the place may not.
    upto = blocks.gather(1, block.clamp(max=blocks.shape[1] - 1))
    share = (place - before) / (upto - before)
    found = torch.searchsorted(inside, _below(share * inside[:, -1:], inside[:, -1:]), right=True)
    # Only non-finite weights lead beyond the vocabulary; what is wrong there shows in their log-probs.
    return (block * _BLOCK + found).squeeze(-1).clamp(max=vocabulary - 1)


def _below(x: Tensor, limit: Tensor) -> Tensor:
    """Return ``x``, or the number just below ``limit`` where rounding has reached it."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))
