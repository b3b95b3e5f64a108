"""Comparison: intervals by hand, win rates at their limits, distinct n-grams."""

from __future__ import annotations

import math

import pytest

from rlhf_ppo.pipeline.evaluation.intervals import win_rate
from rlhf_ppo.runtime.statistics import differences, interval
from rlhf_ppo.runtime.texts import distinct


def test_the_interval_of_two_values_by_hand():
    """1 and 3: mean 2, standard deviation sqrt 2, standard error 1. A None counts for nothing."""
    assert interval([1.0, None, 3.0]) == {"mean": 2.0, "half_width": pytest.approx(1.96)}
    assert interval([5.0]) == {"mean": 5.0, "half_width": None}
    assert interval([None]) == {"mean": None, "half_width": None}


def test_zero_is_a_value():
    assert interval([0.0, 0.0]) == {"mean": 0.0, "half_width": 0.0}
    assert differences([0.0, None, 2.0], [0.0, 1.0, None]) == [0.0]


def test_ties_count_half():
    assert win_rate([1.0, 2.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0])["mean"] == 0.5
    rate = win_rate([2.0, 1.0], [1.0, 1.0])
    assert (rate["mean"], rate["ties"], rate["judged"]) == (0.75, 1, 2)


def test_wilson_at_its_limits():
    """All of n won: low is n / (n + z^2), high is 1. Half won: symmetric about 1/2."""
    rate = win_rate([1.0] * 20, [0.0] * 20)
    assert rate["low"] == pytest.approx(20 / (20 + 1.96**2)) and rate["high"] == pytest.approx(1)
    even = win_rate([1.0, 0.0] * 50, [0.0, 1.0] * 50)
    assert even["low"] + even["high"] == pytest.approx(1)
    # For many pairs it is the normal interval: 1.96 * sqrt(1/4 / 100) = 0.098, a little less.
    assert even["high"] - 0.5 == pytest.approx(0.098, abs=0.003)


def test_pairs_without_a_verdict_are_left_out_and_none_at_all_is_an_error():
    assert win_rate([1.0, None, 0.0], [0.0, 0.0, None])["judged"] == 1
    with pytest.raises(ValueError, match="scored no pair"):
        win_rate([None, 1.0], [1.0, None])


def test_distinct_n_by_hand():
    """a b a b: 2 of 4 words, (a b)(b a)(a b): 2 of 3 pairs; n-grams do not reach over two texts."""
    assert distinct(["a b a b"], 1) == 0.5 and distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b", "a b"], 2) == 0.5 and distinct(["a", "b"], 2) == 0.0
    assert math.isclose(distinct(["x y", "z"], 1), 1.0)
