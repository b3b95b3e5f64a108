"""Proves that records index every field alike, and that shapes, masks and dtypes are checked rather than guessed."""

import dataclasses

import pytest
import torch

from rlhf_ppo.core import Ban, BannedTokens, Experience
from rlhf_ppo.core.types import compute_dtype, require_bool, require_same_shape, result_dtype

LATER = ["weights", "ref_logprobs", "turns", "sampled_logprobs", "positive"]


def experience(**changes):
    fields = {name: torch.arange(12.0).reshape(4, 3) + 100 * i for i, name in enumerate(["logprobs", "values"])}
    fields |= {"advantages": torch.arange(12.0).reshape(4, 3) + 200, "returns": torch.arange(12.0).reshape(4, 3) + 300}
    fields |= {name: torch.arange(12.0).reshape(4, 3) + 300 + 100 * i for i, name in enumerate(LATER, 1)}
    return Experience(**(fields | {"mask": torch.arange(12).reshape(4, 3) % 5 > 0} | changes))


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), slice(1, 3), torch.tensor([True, False, False, True])])
def test_indexing_takes_the_same_rows_of_every_field(rows):
    old = experience()
    part = old[rows]
    for field in dataclasses.fields(Experience):
        assert torch.equal(getattr(part, field.name), getattr(old, field.name)[rows]), field.name


def test_indexing_without_a_critic_keeps_none():
    part = experience(values=None, returns=None, **dict.fromkeys(LATER))[torch.tensor([1])]
    assert part.values is None
    assert part.returns is None
    assert part.weights is part.ref_logprobs is part.turns is None
    assert part.logprobs.shape == (1, 3)


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        experience().logprobs = torch.zeros(4, 3)


def test_a_column_beside_a_vector_is_an_error_that_says_both_shapes():
    # [5, 1] minus [5] would broadcast to [5, 5] without a word.
    with pytest.raises(ValueError, match=r"b \(5, 1\) and a \(5,\)"):
        require_same_shape(a=torch.zeros(5), b=torch.zeros(5, 1))


def test_none_is_no_shape_and_equal_shapes_pass():
    require_same_shape(a=torch.zeros(2, 3), b=None, c=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"c \(3,\) and a \(2,\)"):  # every tensor is looked at, not the first two
        require_same_shape(a=torch.zeros(2), b=torch.zeros(2), c=torch.zeros(3))


def test_masks_must_be_bool():
    require_bool(first=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"second must be a bool tensor, got torch.int64"):
        require_bool(first=torch.ones(2, dtype=torch.bool), second=torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("given", "compute", "result"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.int64, torch.float32, torch.float32),
        (torch.bool, torch.float32, torch.float32),
    ],
)
def test_dtypes_to_compute_in_and_to_return(given, compute, result):
    x = torch.zeros(1, dtype=given)
    assert compute_dtype(x) == compute
    assert result_dtype(x) == result


def test_banned_tokens_by_their_earlier_name_keep_its_fields():
    rows = torch.tensor([True, False])
    ban = Ban(rows=rows, tokens=(3,))
    assert isinstance(ban, BannedTokens)
    assert ban.rows is ban.where is rows and tuple(ban) == (rows, (3,))
