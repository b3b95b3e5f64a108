"""Repetition and diversity of sampled tokens, against counts by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf_ppo.generation.repetition import distinct_fraction, repeated_fraction


def rows(*responses: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, responses))
    ids = torch.tensor([[*said, *[7] * (length - len(said))] for said in responses])
    return ids, torch.tensor([[t < len(said) for t in range(length)] for said in responses])


def test_a_repeated_run_counts_from_its_second_time_on():
    # 5 5 5 5 5 5: three runs of four, two of them seen before; 1..6: three different ones; three tokens: none.
    ids, mask = rows([5] * 6, [1, 2, 3, 4, 5, 6], [5, 5, 5])
    assert repeated_fraction(ids, mask).tolist() == pytest.approx([2 / 3, 0, 0])


def test_padding_and_replies_are_no_part_of_a_run():
    ids, mask = rows([1, 2, 1, 2, 9, 9], [3, 4])
    assert distinct_fraction(ids, mask, 2) == pytest.approx(5 / 6)  # 12 21 12 29 99 34
    mask[0, 2] = False  # a reply between: 12 | 29 99 are left, and 34
    assert distinct_fraction(ids, mask, 2) == 1.0 and distinct_fraction(ids, mask, 7) == 0.0


def test_ids_beyond_a_small_vocabulary_do_not_collide():
    ids = torch.arange(200_000).reshape(2, -1)
    assert distinct_fraction(ids, torch.ones_like(ids, dtype=torch.bool), 4) == 1.0
