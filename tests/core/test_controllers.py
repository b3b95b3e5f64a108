"""Proves that each controller moves the right way, by the published amount, within bounds, and in the right unit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ppo.core import adapt_clip_range, adapt_kl_coef, adapt_penalty_beta

positive = st.floats(1e-4, 1e3)
non_finite = pytest.mark.parametrize("observed", [math.nan, math.inf, -math.inf])


class TestKLCoefficient:
    # 256 samples over a horizon of 10,000: an error clipped to 20 % moves the weight by .512 %.
    @pytest.mark.parametrize(
        ("observed", "expected"),
        [
            (6.0, 0.2),
            (6.6, 0.2 * (1 + 0.1 * 0.0256)),
            (5.4, 0.2 * (1 - 0.1 * 0.0256)),
            (600.0, 0.2 * (1 + 0.2 * 0.0256)),
            (0.0, 0.2 * (1 - 0.2 * 0.0256)),
            (-3.0, 0.2 * (1 - 0.2 * 0.0256)),  # k1's mean may be negative
        ],
    )
    def test_by_hand(self, observed, expected):
        new = adapt_kl_coef(0.2, observed, target=6.0, horizon=10_000, num_samples=256)
        assert new == pytest.approx(expected, rel=1e-12)

    def test_per_response_and_per_token_differ(self):
        # 50 tokens at .2 nats are 10 nats a response: above a target of 6. The same KL per token, .2, is far below.
        per_token, tokens = 0.2, 50
        settings = {"target": 6.0, "horizon": 100, "num_samples": 10}
        assert adapt_kl_coef(0.1, per_token * tokens, **settings) > 0.1
        assert adapt_kl_coef(0.1, per_token, **settings) < 0.1

    def test_a_whole_horizon_of_samples_moves_it_by_a_fifth(self):
        assert adapt_kl_coef(1.0, 100.0, target=6.0, horizon=64, num_samples=64) == pytest.approx(1.2)

    @given(positive, st.floats(-1e6, 1e6), positive)
    def test_bounded_and_of_the_right_sign(self, coef, observed, target):
        new = adapt_kl_coef(coef, observed, target=target, horizon=100, num_samples=100)
        assert 0.799 * coef <= new <= 1.201 * coef
        if observed > 1.001 * target:
            assert new > coef
        elif observed < 0.999 * target:
            assert new < coef

    def test_zero_stays_zero(self):
        assert adapt_kl_coef(0.0, 100.0, target=6.0, horizon=10, num_samples=10) == 0

    @non_finite
    def test_non_finite_is_ignored(self, observed):
        assert adapt_kl_coef(0.3, observed, target=6.0, horizon=10, num_samples=10) == 0.3

    @pytest.mark.parametrize("wrong", [{"target": 0.0}, {"target": -1.0}, {"horizon": 0}, {"target": math.nan}])
    def test_errors(self, wrong):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be positive"):
            adapt_kl_coef(0.3, 1.0, **({"target": 6.0, "horizon": 10, "num_samples": 10} | wrong))


class TestPenaltyBeta:
    # target .3: the band is (.2, .45).
    @pytest.mark.parametrize(
        ("observed", "factor"), [(0.19, 0.5), (0.21, 1), (0.3, 1), (0.44, 1), (0.46, 2), (0.0, 0.5)]
    )
    def test_by_hand(self, observed, factor):
        assert adapt_penalty_beta(0.7, observed, target=0.3) == pytest.approx(0.7 * factor)

    def test_the_edges_belong_to_the_band(self):
        assert adapt_penalty_beta(1.0, 2.0 / 1.5, target=2.0) == 1
        assert adapt_penalty_beta(1.0, 3.0, target=2.0) == 1

    @non_finite
    def test_non_finite_is_ignored(self, observed):
        assert adapt_penalty_beta(0.7, observed, target=0.3) == 0.7

    def test_errors(self):
        with pytest.raises(ValueError, match="target must be positive"):
            adapt_penalty_beta(1.0, 0.1, target=0.0)


class TestClipRange:
    @pytest.mark.parametrize(("observed", "factor"), [(0.19, 2), (0.21, 1), (0.3, 1), (0.44, 1), (0.46, 0.5), (0.0, 2)])
    def test_by_hand(self, observed, factor):
        # The other way round than beta: too much change means a smaller range.
        assert adapt_clip_range(0.2, observed, target=0.3) == pytest.approx(0.2 * factor)

    def test_the_edges_belong_to_the_band(self):
        assert adapt_clip_range(0.2, 2.0 / 1.5, target=2.0) == 0.2
        assert adapt_clip_range(0.2, 3.0, target=2.0) == 0.2

    @given(st.lists(st.floats(0, 10), max_size=30), st.floats(0.01, 0.1), st.floats(0.1, 1))
    def test_it_never_leaves_its_bounds(self, observations, low, high):
        # Without bounds thirty quiet updates would take .2 to 2e8.
        clip_range = 0.2
        for observed in observations:
            clip_range = adapt_clip_range(clip_range, observed, target=0.01, low=low, high=high)
            assert low <= clip_range <= high

    def test_default_bounds(self):
        assert adapt_clip_range(0.4, 0.0, target=0.3) == 0.5
        assert adapt_clip_range(0.03, 9.0, target=0.3) == 0.02

    def test_equal_bounds_pin_it(self):
        assert adapt_clip_range(0.4, 0.0, target=0.3, low=0.1, high=0.1) == 0.1

    @non_finite
    def test_non_finite_is_ignored(self, observed):
        assert adapt_clip_range(0.2, observed, target=0.3) == 0.2

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"target": 0.0}, "target must be positive, got 0.0"),
            ({"low": 0.0}, "low must be positive, got 0.0"),
            ({"low": 0.6}, "low=0.6 must not exceed high=0.5"),
        ],
    )
    def test_errors(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            adapt_clip_range(0.2, 0.1, **({"target": 0.3} | wrong))
