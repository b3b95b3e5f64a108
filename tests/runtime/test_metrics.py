"""The metric dictionary accepts what it describes; averages equal a direct computation."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ppo.runtime.logs.metrics import METRICS, MetricAverage, metrics_page, require_known_metrics


def test_an_unknown_key_is_refused_and_a_family_accepted():
    require_known_metrics({"score/mean": 1.0, "score/part/anything": 2.0})
    with pytest.raises(KeyError, match=r"'score/maen' is not in the metric dictionary"):
        require_known_metrics({"score/mean": 1.0, "score/maen": 2.0})
    with pytest.raises(KeyError):
        require_known_metrics({"score/part": 1.0})


def test_a_key_of_no_family_is_the_users_own_unless_it_is_a_misspelt_one():
    require_known_metrics({"custom/success_rate": 1.0, "success": 0.5, "rewards/distance": 1.0, "scores": 1.0})
    for key, hint in {
        "eval/success": "such as 'custom/success'",
        "score": "such as 'custom/score'",
        "policy/aprox_kl": "did you mean 'policy/approx_kl'",
        "polcy/approx_kl": "did you mean 'policy/approx_kl'",
    }.items():
        with pytest.raises(KeyError, match=hint):
            require_known_metrics({key: 1.0})


def test_every_metric_has_a_sentence_and_a_row_on_the_page():
    page = metrics_page()
    for key, meaning in METRICS.items():
        assert meaning.endswith(".") and f"| `{key}` | {meaning} |" in page


def test_an_average_over_parts_is_the_average_over_all():
    """Parts of 1, 3 and 4 actions: the mean of their means would be another number."""
    x = torch.arange(8.0) ** 2
    average = MetricAverage()
    for part in x.split([1, 3, 4]):
        average.add({"x": part.mean(), "max_x": part.max()}, weight=len(part))
    # 0 + 1 + 4 + ... + 49 = 140; 140 / 8 = 17.5. The mean of means would be (0 + 14/3 + 126/4) / 3 = 12.06.
    assert average.compute() == {"x": pytest.approx(17.5), "max_x": 49.0}
    assert average.compute("a/") == {"a/x": pytest.approx(17.5), "a/max_x": 49.0}


def test_merging_equals_adding_everything_to_one():
    whole, left, right = MetricAverage(), MetricAverage(), MetricAverage()
    for i, (value, weight) in enumerate([(1.0, 2), (4.0, 1), (-3.0, 5)]):
        entry = {"v": torch.tensor(value), "max_v": torch.tensor(value)}
        whole.add(entry, weight)
        (left if i < 2 else right).add(entry, weight)
    left.merge(right)
    # (2 + 4 - 15) / 8
    assert left.compute() == whole.compute() == {"v": pytest.approx(-9 / 8), "max_v": 4.0}


def test_nothing_seen_is_nan_and_weight_0_does_not_count():
    average = MetricAverage()
    average.add({"x": torch.tensor(0.0)}, weight=0)
    assert math.isnan(average.compute()["x"])
    average.add({"x": torch.tensor(3.0)}, weight=2)
    assert average.compute() == {"x": 3.0}
    assert MetricAverage().compute() == {}


def test_no_gradient_is_held():
    average = MetricAverage()
    average.add({"x": torch.ones((), requires_grad=True) * 2}, weight=torch.tensor(3))
    assert average.compute() == {"x": 2.0}
