"""The interquartile mean by hand, and an interval that covers what it should."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_ppo.runtime.statistics import bootstrap_iqm, iqm, mean_and_error


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 5.0], 3.0),
        ([1000.0, 2.0, -50.0, 4.0], 3.0),  # the middle two of four
        # Five runs cover fifths: of the second and the fourth 0.15 of 0.2 lies inside, so weights 0.75, 1, 0.75.
        ([0.0, 1.0, 2.0, 6.0, 100.0], (0.75 * 1 + 2 + 0.75 * 6) / 2.5),
    ],
)
def test_the_interquartile_mean_by_hand(scores, expected):
    assert iqm(np.array(scores)) == pytest.approx(expected)
    assert iqm(np.array([scores[::-1], scores])) == pytest.approx([expected, expected])


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    """20 runs from a normal distribution around 3: of 200 such intervals at 95 % some 180 to 195 hold 3."""
    draw = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        middle, low, high = bootstrap_iqm([draw.normal(3.0, 1.0, 20)], seed=i)
        assert low <= middle <= high
        covered += bool(low <= 3 <= high)
    assert 175 <= covered <= 198


def test_environments_are_resampled_apart():
    """Two environments whose runs do not vary: mixing them would, resampling each alone does not."""
    middle, low, high = bootstrap_iqm([np.full(3, 0.0), np.full(3, 1.0)])
    assert middle == low == high == pytest.approx(0.5)


def test_the_same_seed_gives_the_same_interval_and_one_run_says_nothing():
    scores = [np.arange(5.0)]
    assert bootstrap_iqm(scores) == bootstrap_iqm(scores)
    assert bootstrap_iqm(scores, seed=1)[1:] != bootstrap_iqm(scores, seed=2)[1:]
    assert bootstrap_iqm([np.array([4.0])]) == (4.0, 4.0, 4.0)


def test_mean_and_standard_error_by_hand():
    """Deviations 1, 0, -1: a variance of 1 with n - 1, over three runs."""
    assert mean_and_error(np.array([1.0, 2.0, 3.0])) == "2.0 +- 0.6"
    assert mean_and_error(np.array([4.0])) == "4.0"
