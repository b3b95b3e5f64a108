"""Packing: every token lies where its position, its neighbours and the index say; token batches keep their budget."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config

from rlhf_ppo.data.tokenization import left_pad
from rlhf_ppo.models.forward.packing import Packing, packed_attention, token_batches
from rlhf_ppo.models.forward.runner import Sequences

CPU = torch.device("cpu")


def rows_of(prompt_lengths: list[int], response_lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """Every token has an id of its own: 100 * row + place in its sequence, so that ids tell where they belong."""
    prompts = [[100 * row + i for i in range(n)] for row, n in enumerate(prompt_lengths)]
    ids, mask = left_pad(prompts, CPU)
    longest = max(response_lengths)
    responses, response_mask = torch.zeros(2, len(prompts), longest, dtype=torch.long)
    for row, (start, n) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        responses[row, :n] = 100 * row + start + torch.arange(n)
        response_mask[row, :n] = 1
    return ids, mask, responses, response_mask.bool()


def pack(ids: torch.Tensor, mask: torch.Tensor, responses: torch.Tensor, response_mask: torch.Tensor) -> Any:
    """Return the packed ids [N], and how they are packed."""
    sequences, layout = Sequences(ids, mask, responses, response_mask).laid_out()
    return sequences.inputs.flatten()[layout.packed.places], layout.packed


def test_by_hand():
    # Row 0: prompt 0 1, response 2 3 4; row 1: prompt 100, response 101. Inputs 0 1 2 3 and 100, the shorter first.
    ids, packed = pack(*rows_of([2, 1], [3, 1]))
    assert ids.tolist() == [100, 0, 1, 2, 3]
    assert packed.positions.tolist() == [[0, 0, 1, 2, 3]]
    assert packed.packing.lengths == (1, 4)
    assert packed.packing.bounds.tolist() == [0, 1, 5]
    # Before 2, 3, 4 come 1, 2, 3 at places 2, 3, 4; before 101 comes 100 at place 0.
    assert packed.before.tolist() == [2, 3, 4, 0]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8))
def test_every_input_once_and_each_response_token_behind_its_predecessor(lengths):
    prompts, responses = [list(side) for side in zip(*lengths, strict=True)]
    batch = rows_of(prompts, responses)
    ids, packed = pack(*batch)
    packed_lengths = packed.packing.lengths
    expected = [100 * row + i for row, (p, t) in enumerate(lengths) for i in range(p + t - 1)]
    assert sorted(ids.tolist()) == expected
    # A token's position is its place in its sequence, which its id tells.
    assert torch.equal(packed.positions[0], ids % 100)
    assert packed_lengths == tuple(sorted(p + t - 1 for p, t in lengths))
    rows = [piece[0] // 100 for piece in ids.split(packed_lengths)]
    assert sorted(map(int, rows)) == list(range(len(lengths)))
    for piece in ids.split(packed_lengths):
        assert (piece.diff() == 1).all()
    assert torch.equal(ids[packed.before], batch[2][batch[3]] - 1)


def test_packed_attention_ends_with_its_block_also_after_an_error():
    config = GPT2Config()
    config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError), packed_attention(config, Packing((1, 2), CPU)):
        with packed_attention(config, Packing((3,), CPU)):
            assert config._attn_implementation == "rlhf_ppo_packed"
        assert config._attn_implementation == "rlhf_ppo_packed"
        raise RuntimeError
    assert config._attn_implementation == "sdpa"


def test_token_batches_by_hand():
    assert token_batches([5, 1, 3, 3], 6, padded=False) == [[1, 2], [3], [0]]
    # 1 and 3 count as 3 each when padded; a row above the budget goes alone.
    assert token_batches([5, 1, 3, 3], 6, padded=True) == [[1, 2], [3], [0]]
    assert token_batches([2, 3, 1], 6, padded=False) == [[2, 0, 1]]
    assert token_batches([2, 3, 1], 6, padded=True) == [[2, 0], [1]]
    assert token_batches([9, 2], 4, padded=True) == [[1], [0]]
    assert token_batches([], 4, padded=False) == []


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60), st.booleans())
def test_token_batches_keep_their_budget_and_lose_no_row(lengths, budget, padded):
    groups = token_batches(lengths, budget, padded=padded)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))

    def tokens(group: list[int]) -> int:
        inside = [lengths[row] for row in group]
        return max(inside) * len(inside) if padded else sum(inside)

    for group in groups:
        assert tokens(group) <= budget or len(group) == 1
    # None could have taken the next row as well.
    for group, after in pairwise(groups):
        assert tokens([*group, after[0]]) > budget
