"""Proves that minibatches cover a rollout exactly once, in even parts, shuffled, and repeatably."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ppo.core import minibatch_indices


@given(st.integers(1, 60), st.data())
def test_every_row_once_in_even_parts(size, data):
    parts = data.draw(st.integers(1, size))
    batches = minibatch_indices(size, parts)
    assert len(batches) == parts
    assert sorted(torch.cat(batches).tolist()) == list(range(size))
    lengths = [len(batch) for batch in batches]
    assert max(lengths) - min(lengths) <= 1


def test_shuffled_and_fresh_each_time():
    first, second = (torch.cat(minibatch_indices(100, 4)) for _ in range(2))
    assert not torch.equal(first, torch.arange(100))
    assert not torch.equal(first, second)


def test_a_generator_makes_it_repeatable_and_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    first, second = (minibatch_indices(50, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    other = minibatch_indices(50, 3, generator=torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(before, torch.get_rng_state())


def test_device(device):
    assert all(batch.device.type == device.type for batch in minibatch_indices(6, 2, device=device))
    meta = minibatch_indices(6, 2, device="meta")  # reached on any machine
    assert all(batch.device.type == "meta" for batch in meta)


@pytest.mark.parametrize(("size", "parts"), [(3, 4), (3, 0), (0, 1), (3, -1)])
def test_an_empty_minibatch_is_an_error(size, parts):
    with pytest.raises(ValueError, match=f"{size} rows cannot fill num_minibatches={parts}"):
        minibatch_indices(size, parts)
