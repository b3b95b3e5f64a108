"""Compilation pays, or it does not: decided once, from the times of a minibatch, and kept for a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_ppo.runtime.processes.group import ALONE
from rlhf_ppo.training import update as update_module
from rlhf_ppo.training.models import compilation
from rlhf_ppo.training.models.compilation import choose_layers, timed_minibatch


def clock(model: Any, *, plain: float, first: float, compiled: float) -> Callable[[], float]:
    """Made-up times; the first compiled minibatch includes compiling."""
    firsts = iter([first])
    return lambda: next(firsts, compiled) if model.compiled else plain


@pytest.mark.parametrize(
    ("left", "times", "pays"),
    [
        (1000, {"plain": 1.0, "first": 31.0, "compiled": 0.9}, True),  # 30 s to save 100 s
        (250, {"plain": 1.0, "first": 31.0, "compiled": 0.9}, False),  # 30 s to save 25 s
        (1000, {"plain": 1.0, "first": 31.0, "compiled": 1.1}, False),
    ],
)
def test_layers_stay_compiled_if_they_save_more_than_they_cost(left, times, pays):
    model: Any = SimpleNamespace(compiled=None)
    said = choose_layers(model, clock(model, **times), left=left, estimate_s=1.0)
    assert model.compiled is pays
    assert said is not None and f"run {'compiled' if pays else 'plain'} layers" in said
    assert f"{left} minibatches to come" in said and "s to compile" in said


def test_short_runs_do_not_try():
    model: Any = SimpleNamespace(compiled=None)
    assert choose_layers(model, lambda: pytest.fail("tried"), left=100, estimate_s=1.0) is None
    assert model.compiled is False


def test_layers_that_fail_stay_plain():
    model: Any = SimpleNamespace(compiled=None)

    def fails() -> float:
        model.compiled = False
        return 1.0

    assert choose_layers(model, fails, left=1000, estimate_s=1.0) is None
    assert model.compiled is False


class Two:
    """Two processes, of which the other one says ``other``."""

    def __init__(self, other: list[Any]) -> None:
        self.other = other

    def facts(self, work: Callable[[], Any]) -> list[Any]:
        return [work(), self.other]


def test_a_minibatch_takes_as_long_as_the_slowest_process_and_leaves_no_gradient():
    model: Any = nn.Linear(2, 1)
    model.compiled = True

    def compute() -> None:
        model(torch.ones(1, 2)).sum().backward()

    assert timed_minibatch(model, compute, torch.device("cpu"), Two([1e6, True])) == 1e6
    assert model.compiled is True and model.weight.grad is None
    assert timed_minibatch(model, compute, torch.device("cpu"), ALONE) < 1e6
    timed_minibatch(model, compute, torch.device("cpu"), Two([0.0, False]))
    assert model.compiled is False  # it has failed there


@pytest.fixture
def tries(monkeypatch) -> list[int]:
    """Let runs on a CPU try as they do on a GPU; collects what ``choose_layers`` is told of minibatches to come."""
    lefts: list[int] = []

    def choose(model: Any, minibatch_s: Callable[[], float], *, left: int, estimate_s: float) -> str:
        assert 0 < minibatch_s() < 60 and 0 < estimate_s < 60
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        lefts.append(left)
        model.compiled = False
        return "compile=auto: measured"

    monkeypatch.setattr(update_module.Run, "tries_compiling", True)
    monkeypatch.setattr(update_module, "choose_layers", choose)
    return lefts


def test_a_run_measures_once_in_its_first_update_and_learns_the_same(make_trainer, tries, caplog):
    """24 responses of 8 are 3 rollouts, each of 2 epochs and 2 minibatches: 8 steps are left after the first."""
    trainers = [make_trainer(total_episodes=24, quiet=False) for _ in range(2)]
    trainers[0].train()
    assert tries == [8] and caplog.text.count("compile=auto: measured") == 1
    trainers[1].state.model.compiled = False
    trainers[1].train()
    assert tries == [8]
    for one, other in zip(*(t.model.parameters() for t in trainers), strict=True):
        assert torch.equal(one, other)


def test_a_critic_that_warms_up_is_not_measured(make_trainer, tries):
    make_trainer(total_episodes=24, critic_warmup_rollouts=1).train()
    assert tries == [4]


def test_a_cpu_does_not_try(make_trainer, monkeypatch):
    monkeypatch.setattr(compilation, "WORTH_A_TRY_S", 0.0)
    monkeypatch.setattr(update_module, "choose_layers", lambda *_, **__: pytest.fail("tried"))
    trainer = make_trainer()
    trainer.train()
    assert trainer.model.compiled is None


def test_a_resumed_run_keeps_the_decision(make_trainer, tries):
    trainer = make_trainer(save_every=1, total_episodes=24)
    trainer.train()
    assert tries == [8]
    again = make_trainer(output_dir=trainer.args.output_dir, save_every=1, total_episodes=24)
    again.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    assert tries == [8]


def test_always_needs_layers(make_trainer, monkeypatch):
    monkeypatch.setattr("rlhf_ppo.models.acceleration.compiled_layers.transformer_layers", lambda _: [])
    with pytest.raises(ValueError, match="compile='always': the model has no layers"):
        make_trainer(compile="always")
