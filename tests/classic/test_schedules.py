"""Schedules by name and by function, and Adam's settings."""

from __future__ import annotations

import pytest
import torch

import classic
from classic.gradient_step import Adam
from classic.schedules import factor
from rlhf_ppo.runtime.logs.run_directory import RunDirectory


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.1]),
        ("cosine", [1, (1 + 0.5**0.5) / 2, 0.5, 0.0244717]),  # half a wave from 1 to 0
        ("piecewise:0.25=0.5,0.9=0.01", [1, 0.5, 0.5, 0.01]),
    ],
)
def test_factors_of_named_schedules(schedule, expected):
    assert [factor(schedule, done) for done in (0, 0.25, 0.5, 0.9)] == pytest.approx(expected, abs=1e-6)


def test_a_function_of_ones_own_sets_the_learning_rate(small, tmp_path):
    (tmp_path / "own.py").write_text("def warm_up(done):\n    return min(1, 4 * done)\n")
    schedule = f"{tmp_path}/own.py:warm_up"
    args = small(lr_schedule=schedule, ent_coef=0.1, ent_coef_schedule="cosine", autoreset_mode="same_step")
    agent = classic.PPO("tests/Match-v0", classic.PPOArgs(**{**vars(args), "output_dir": str(tmp_path / "run")}))
    agent.learn(8 * 64)
    rates = [row["optim/learning_rate"] for row in RunDirectory(tmp_path / "run").read()]
    assert rates == pytest.approx([3e-3 * min(1, 4 * k / 8) for k in range(8)])
    assert agent.config.ent_coef == pytest.approx(0.1 * factor("cosine", 7 / 8))


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("cosin", r"lr_schedule must be constant, .* got 'cosin'; did you mean 'cosine'\?"),
        ("piecewise:0.5", "'0.5' is no share=factor; write shares and factors as"),
        ("piecewise:0.9=0.1,0.5=1", "shares must rise from 0 to below 1"),
        ("piecewise:0.1=-1", "factors be 0 or more"),
    ],
)
def test_a_wrong_schedule_is_refused(schedule, words, small):
    with pytest.raises(ValueError, match=words):
        small(lr_schedule=schedule)


def test_a_function_that_returns_no_number_is_named(small, tmp_path):
    (tmp_path / "own.py").write_text("def odd(done):\n    return None\n")
    with pytest.raises(ValueError, match=r"own\.py:odd' must return a finite number, 0 or more, got None at 0"):
        classic.PPO("tests/Match-v0", small(lr_schedule=f"{tmp_path}/own.py:odd")).learn(64)


@pytest.mark.parametrize("plain", [False, True])
def test_weight_decay_and_epsilon_are_adamws(plain, monkeypatch):
    """One step from zero moments: w * (1 - lr * decay) - lr * g / (|g| + eps)."""
    monkeypatch.setattr("classic.fast.switch.ENABLED", not plain)
    made = classic.PPO("tests/Match-v0", classic.PPOArgs(hidden_sizes=(4,), weight_decay=0.5, adam_eps=0.1, quiet=True))
    made.learn(1, callbacks=[lambda *_: True])  # the settings reach the optimizer with the first rollout
    optimizer = (Adam if plain else type(made.optimizer))(made.network, 0.01)
    assert (made.optimizer.eps, made.optimizer.weight_decay) == (0.1, 0.5) and type(made.optimizer) is type(optimizer)
    optimizer.eps, optimizer.weight_decay = 0.1, 0.5
    weight = made.network.policy[0].weight
    before, gradient = weight.detach().clone(), torch.full_like(weight, 0.3)
    for parameter in made.network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    weight.grad.copy_(gradient)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.01 * 0.5) - 0.01 * 0.3 / (0.3 + 0.1))


def test_settings_of_adam_are_checked_and_resume(small, tmp_path):
    with pytest.raises(ValueError, match="weight_decay must be 0 or more"):
        small(weight_decay=-0.1)
    with pytest.raises(ValueError, match="adam_eps must be positive"):
        small(adam_eps=0.0)
    args = {"weight_decay": 0.1, "adam_eps": 1e-3, "save_every": 1}
    whole = classic.PPO("tests/Match-v0", small(**args, output_dir=str(tmp_path / "a"))).learn(256)
    again = classic.PPO("tests/Match-v0", small(**args, output_dir=str(tmp_path / "b")))
    again.learn(256, resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    assert torch.equal(whole.optimizer.weights.vector, again.optimizer.weights.vector)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_factors_are_finite(value, small):
    with pytest.raises(ValueError, match="factors be 0 or more and finite"):
        small(lr_schedule=f"piecewise:0.5={value}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_schedule": "nofile.py:f"}, r"lr_schedule='nofile\.py:f', after 0 of .*does not exist"),
        (
            {"clip_range_schedule": "piecewise:0.5=0"},
            r"clip_range_schedule='piecewise:0\.5=0', after 0\.5 .* above 0",
        ),
        ({"ent_coef_schedule": "own.py:breaks"}, "after 0.5 of all steps: .* failed at 0.5: IndexError: too late"),
    ],
)
def test_a_schedule_that_fails_is_found_before_the_last_run_is_moved(settings, words, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "def breaks(done):\n    if done < 0.5:\n        return 1\n    raise IndexError('too late')\n"
    )
    classic.PPO("tests/Match-v0", small(output_dir="run")).learn(64)
    before = sorted(file.name for file in (tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match=words):
        classic.PPO("tests/Match-v0", small(output_dir="run", **settings)).learn(64)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == before
