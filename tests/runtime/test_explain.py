"""Explanations: every column by hand, whatever the objective, and the three forms they come in."""

from __future__ import annotations

import builtins
import math

import pytest
import torch

from rlhf_ppo.core import Experience, PPOConfig
from rlhf_ppo.runtime.explain import COLUMNS, explain_actions

# Ratios of the six real actions: two gone too far (one each way), two that the clip leaves alone because they moved
# against their advantage, one inside, and one with an advantage of 0. The fourth place of row 1 is padding.
RATIOS = [[1.5, 0.5, 1.5, 0.5], [1.1, 1.0, 9.0, math.nan]]
WEIGHTS = [[1.0, -1.0, -1.0, 1.0], [2.0, 0.0, 9.0, math.nan]]
MASK = torch.tensor([[True] * 4, [True, True, False, False]])


def explain(**settings):
    ratios, weights = torch.tensor(RATIOS), torch.tensor(WEIGHTS)
    flags = torch.zeros(2, 4, dtype=torch.bool)
    terminated, truncated = flags.clone(), flags.clone()
    terminated[0, 3] = True
    truncated[1, 1] = True
    critic = settings.pop("critic", True)
    old_logprobs = torch.full((2, 4), -1.0)
    given = {"new_logprobs": old_logprobs + ratios.log(), "kl": None}
    given |= {name: settings.pop(name) for name in tuple(given) if name in settings}
    return explain_actions(
        rewards=torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 0.0]]),
        values=torch.full((2, 4), 10.0) if critic else None,
        next_values=torch.full((2, 4), 20.0) if critic else None,
        terminated=terminated,
        truncated=truncated,
        advantages=weights * 3,
        old=Experience(old_logprobs, None, weights, None, MASK),
        **given,
        config=PPOConfig(**settings),
        gamma=0.5,
        labels=[["a", "b", "c", "d"], ["e", "f", "pad", "pad"]],
    )


def column(explanation, name):
    return [row[name] for row in explanation.rows]


def test_each_column_by_hand():
    explanation = explain()
    assert column(explanation, "label") == list("abcdef")
    assert column(explanation, "sequence") == [0, 0, 0, 0, 1, 1] and column(explanation, "step") == [0, 1, 2, 3, 0, 1]
    # r + 0.5 * 20 - 10, but the terminated step has no future: 4 - 10.
    assert column(explanation, "delta") == [1, 2, 3, -6, 5, 6]
    assert column(explanation, "advantage") == [3, -3, -3, 3, 6, 0]
    assert column(explanation, "weight") == [1, -1, -1, 1, 2, 0]
    assert column(explanation, "ended") == ["", "", "", "terminated", "", "truncated"]
    assert column(explanation, "ratio") == pytest.approx([1.5, 0.5, 1.5, 0.5, 1.1, 1.0])
    assert column(explanation, "clipped") == ["above", "below", "above", "below", "", ""]
    # Beyond the range the gradient is gone only where the action had moved the way its advantage pulls.
    assert column(explanation, "gradient_alive") == [False, False, True, True, True, False]


@pytest.mark.parametrize(
    ("settings", "clipped", "alive"),
    [
        ({"objective": "cispo"}, ["above", "", "above", "", "", ""], [True, True, True, True, True, False]),
        ({"objective": "a2c"}, [""] * 6, [True, True, True, True, True, False]),
        # beta KL(old, new) pulls on every action whose probability has changed.
        ({"objective": "penalty", "penalty_beta": 0.5}, [""] * 6, [True, True, True, True, True, False]),
    ],
)
def test_what_the_clip_did_depends_on_the_objective(settings, clipped, alive):
    explanation = explain(**settings)
    assert column(explanation, "clipped") == clipped
    assert column(explanation, "gradient_alive") == alive


def test_without_a_critic_there_is_no_value_and_no_delta():
    explanation = explain(critic=False)
    assert column(explanation, "value") == column(explanation, "delta") == [None] * 6
    assert not {"value", "delta"} & set(explanation.text().splitlines()[0].split())


def test_as_text():
    lines = explain().text(max_rows=4).splitlines()
    assert lines[0].split() == [name for name in COLUMNS if name != "kl"]
    assert lines[4].split() == [
        "0",
        "3",
        "d",
        "4.000",
        "10.000",
        "-6.000",
        "3.000",
        "1.000",
        "terminated",
        *lines[4].split()[-3:],
    ]
    assert lines[4].split()[-3:] == ["0.500", "below", "yes"]
    assert lines[5] == "... and 2 more rows" and len(explain().text().splitlines()) == 7


def test_as_a_dataframe_or_without_pandas_as_rows(monkeypatch):
    explanation = explain()
    real = builtins.__import__

    def without_pandas(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without_pandas)
        assert explanation.to_dataframe() == explanation.rows
    pandas = pytest.importorskip("pandas")
    frame = explanation.to_dataframe()
    assert isinstance(frame, pandas.DataFrame) and list(frame.columns) == list(COLUMNS)
    assert frame["delta"].sum() == 11


def test_without_a_policy_there_is_no_ratio_and_with_a_reference_a_kl(tmp_path):
    explanation = explain(new_logprobs=None, kl=torch.full((2, 4), 0.25))
    assert explanation.columns == [name for name in COLUMNS if name not in ("ratio", "clipped", "gradient_alive")]
    assert column(explanation, "kl") == [0.25] * 6 and column(explanation.of(1), "label") == ["e", "f"]
    explanation.plot(tmp_path / "no-ratios.png")


def test_as_a_picture(tmp_path):
    explanation = explain()
    for sequence in (None, 1):
        path = explanation.plot(tmp_path / "deep" / f"{sequence}.png", sequence=sequence)
        assert path.read_bytes().startswith(b"\x89PNG")
    explain(critic=False).plot(tmp_path / "no-critic.png")
    with pytest.raises(ValueError, match="no sequence 7; known: 0, 1"):
        explanation.plot(tmp_path / "none.png", sequence=7)
