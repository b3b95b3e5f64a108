"""Value scale: running moments of returns, and heads whose values survive a change of units."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import f64
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ppo.core import ValueScale, rescaled_head, update_value_scale


def all_true(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def test_the_first_rollout_gives_its_own_moments_and_masked_returns_do_not_count():
    returns = f64([[1, 3, math.nan], [5, 7, 99]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    scale = update_value_scale(None, returns, mask)
    assert scale == ValueScale(mean=4.0, std=math.sqrt(5), count=1)  # squared distances 9, 1, 1, 9
    assert update_value_scale(ValueScale(), returns, mask) == scale  # a head in the reward's units has seen none either


def test_equal_rollouts_weigh_alike_until_the_rate_has_fallen_to_its_minimum():
    rollouts = torch.randn(10, 4, 6, dtype=torch.float64) * 3 + 100
    scale = None
    for returns in rollouts:
        scale = update_value_scale(scale, returns, all_true(returns), min_rate=0.1)
    assert scale is not None and scale.count == 10
    assert scale.mean == pytest.approx(float(rollouts.mean()))
    assert scale.std == pytest.approx(float(rollouts.std(correction=0)))
    # From here on the weight is 0.1, not 1/11: mean 0.9 * 100 + 0.1 * 0, variance 0.9 * (4 + 0.1 * 100^2) + 0.1 * 0.
    later = update_value_scale(ValueScale(100.0, 2.0, 10), f64([[0, 0]]), all_true(f64([[0, 0]])), min_rate=0.1)
    assert later.mean == pytest.approx(90) and later.std == pytest.approx(math.sqrt(0.9 * (4 + 0.1 * 100**2)))


@given(a=st.floats(1e-3, 1e3), b=st.floats(-1e6, 1e6), seed=st.integers(0, 99), rollouts=st.integers(1, 4))
def test_the_scale_follows_the_reward_s_scale_and_offset(a, b, seed, rollouts):
    draws = torch.randn(rollouts, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain = other = None
    for returns in draws:
        plain = update_value_scale(plain, returns, all_true(returns))
        other = update_value_scale(other, a * returns + b, all_true(returns))
        torch.testing.assert_close(other.normalize(a * returns + b), plain.normalize(returns), atol=1e-6, rtol=1e-6)


def test_returns_without_spread_or_none_at_all_keep_a_usable_unit():
    constant = f64([[2, 2, 2]])
    assert update_value_scale(None, constant, all_true(constant)).std == 1
    assert update_value_scale(None, constant, all_true(constant), min_std=0.3).std == 0.3
    spread = f64([[1, 3]])
    assert update_value_scale(None, spread, all_true(spread), min_std=0.3).std == 1  # the deviation itself
    known = ValueScale(1.0, 2.0, 3)
    assert update_value_scale(known, constant, ~all_true(constant)) == known
    assert update_value_scale(known, f64([[1, math.inf]]), all_true(spread)) == known


def test_one_absurd_return_pulls_the_scale_by_a_bounded_amount():
    """Unbounded, 1e15 would leave a unit of 1e14, in which all other returns look alike for hundreds of rollouts."""
    known, returns = ValueScale(1.0, 2.0, 30), f64([[1, 3, -1, 1e15]])
    scale = update_value_scale(known, returns, all_true(returns))
    assert scale == update_value_scale(known, f64([[1, 3, -1, 1 + 1e4 * 2]]), all_true(returns))
    assert scale.std < 1e4 and scale.count == 31
    below = update_value_scale(known, -returns, all_true(returns))
    assert below == update_value_scale(known, f64([[-1, -3, 1, 1 - 1e4 * 2]]), all_true(returns))


def test_a_return_whose_squared_distance_overflows_float32_leaves_the_scale_alone():
    for known in (None, ValueScale(1.0, 2.0, 3)):
        for far in (1e30, -1e30, 1e200):
            returns = f64([[1, far]])
            assert update_value_scale(known, returns, all_true(returns)) == (known or ValueScale())
    # In the units so far: to rewards of that size it is an ordinary number.
    returns = f64([[1e30, 3e30]])
    assert update_value_scale(ValueScale(0.0, 1e30, 3), returns, all_true(returns)).count == 4


def test_a_rescaled_head_predicts_the_same_values():
    weight, bias, states = torch.randn(1, 7), torch.randn(1), torch.randn(5, 7)
    old, new = ValueScale(3.0, 2.0, 4), ValueScale(-10.0, 0.5, 5)
    changed, shifted = rescaled_head(weight, bias, old, new)
    before, after = states @ weight.T + bias, states @ changed.T + shifted
    torch.testing.assert_close(new.denormalize(after), old.denormalize(before))
    assert not torch.allclose(after, before)
