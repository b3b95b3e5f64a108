"""Stability: non-finite numbers reach no weight, moment, statistic or controller; then skip, roll back or stop."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import rlhf_ppo.trainer
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.logs.metrics import MetricAverage
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.training.checkpoints.resume import MAX_ROLLBACKS
from rlhf_ppo.training.stability import PolicyDriftError, StepWatch, nonfinite_parameters, spoil_gradient

NAN = float("nan")


def weights(trainer: PPOTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def poison(trainer: PPOTrainer, when: Any) -> None:
    """Make the gradient of some steps NaN: ``when(trainer, n)`` is asked at the n-th step of the process, from 0."""
    gradient, calls = trainer.fixed.gradient, iter(range(1000))

    def poisoned(*inputs: Any, **settings: Any) -> Any:
        result = gradient(*inputs, **settings)
        if when(trainer, next(calls)):
            next(p for p in trainer.model.trainable_parameters() if p.grad is not None).grad.fill_(NAN)
        return result

    trainer.fixed = dataclasses.replace(trainer.fixed, gradient=poisoned)


def lengths(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_fault_18_a_loss_that_overflows_while_its_gradient_does_not_is_skipped(make_trainer, prompts):
    """Returns of 3e19: their square is beyond float32, twice their difference is not."""
    trainer = make_trainer(num_epochs=1, reward_funcs=lambda p, c, **_: [3e19] * len(p), clip_range_vf=None)
    before = weights(trainer)
    with pytest.warns(UserWarning, match="constant reward"):
        metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["optim/skipped_steps"] == 2 and same(before, weights(trainer))
    # The check by the gradient alone would have let it pass.
    layer = nn.Linear(1, 1, bias=False)
    loss = (layer(torch.full((1, 1), 1.0)) * 3e19).square().sum() * 0 + (layer.weight * 3e19).sum()
    loss.backward()
    assert layer.weight.grad.isfinite().all()
    spoil_gradient([layer.weight], {"policy": torch.tensor(1.0), "value": torch.tensor(float("inf"))}, {})
    assert not layer.weight.grad.isfinite().any()


def test_a_finite_loss_leaves_the_gradient_alone():
    bias, matrix = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(3, 2))
    for parameters in ([bias, matrix], [matrix]):
        for p in parameters:
            p.grad = torch.randn(p.shape)
        before = [p.grad.clone() for p in parameters]
        spoil_gradient(parameters, {"policy": torch.tensor(3e38), "value": torch.tensor(-1.0)}, {})
        assert same(before, [p.grad for p in parameters])


def test_fault_18_rejected_steps_enter_no_average(make_trainer, prompts):
    """The metrics of an update with a non-finite step are those of its other steps."""
    trainer = make_trainer(num_epochs=1, num_minibatches=4)
    gradient, calls = trainer.fixed.gradient, iter(range(100))
    kept: list[Any] = []

    def poisoned(*inputs: Any, **settings: Any) -> Any:
        actions, losses = gradient(*inputs, **settings)
        if next(calls) != 1:
            kept.append(({name: x.clone() for name, x in losses.items()}, actions))
            return actions, losses
        bad = MetricAverage()
        bad.add({**dict.fromkeys(actions.compute(), torch.tensor(NAN))}, weight=torch.tensor(7))
        return bad, {**losses, "policy": torch.tensor(NAN)}

    trainer.fixed = dataclasses.replace(trainer.fixed, gradient=poisoned)
    metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["optim/skipped_steps"] == 1 and all(map(math.isfinite, metrics.values()))
    assert metrics["policy/loss"] == pytest.approx(sum(float(x["policy"]) for x, _ in kept) / 3)
    whole = MetricAverage()
    for _, actions in kept:
        whole.merge(actions)
    for name, value in whole.compute("policy/").items():
        assert metrics[name] == pytest.approx(value), name


def test_fault_18_a_rejected_update_enters_no_statistic_and_no_controller(make_trainer, prompts):
    """Scores of 1e37 would make every later normalised score 0; their KL would move the coefficients."""
    scale = {"by": 1.0}
    settings = {
        "normalize_scores": True,
        "kl_target": 0.001,
        "objective": "adaptive_clip",
        "reward_funcs": lambda p, c, **_: [scale["by"] * i for i in range(len(p))],
    }
    trainer = make_trainer(**settings)
    trainer.step(trainer.rollout(prompts))
    before = copy.deepcopy((trainer.score_statistics, trainer.kl_coef, trainer.objective.clip_range))
    units, learned = trainer.model.value_scale, weights(trainer)
    moments = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    scale["by"] = 1e37  # 7e37 at most: float32 holds it, but not its square
    poison(trainer, lambda trainer, n: True)
    metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["optim/skipped_steps"] == 4
    assert (trainer.score_statistics, trainer.kl_coef, trainer.objective.clip_range) == before
    assert trainer.model.value_scale == units and same(weights(trainer), learned)
    after = trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(moments[i][key], after[i][key]) for i in moments for key in moments[i])


def test_fault_18_consecutive_skipped_steps_are_counted_over_rollouts(make_trainer):
    """Two steps per rollout; the fifth consecutive one is in the third. What was learned is saved to resume from."""
    trainer = make_trainer(total_episodes=40, num_epochs=1, max_skipped_steps=5)
    poison(trainer, lambda trainer, n: n >= 1)
    with pytest.raises(NonFiniteGradientError, match=r"5 consecutive optimizer steps.*rollout 3.*checkpoint-3$"):
        trainer.train()
    assert [row["optim/skipped_steps"] for row in trainer.run.read()] == [1, 2, 2]
    assert "NaN" not in (trainer.run.path / "metrics.jsonl").read_text()  # that would be no JSON
    resumed = make_trainer(total_episodes=40, num_epochs=1, output_dir=str(trainer.run.path))
    resumed.train(resume_from_checkpoint=trainer.run.path / "checkpoint-3")
    assert resumed.iteration == 5


def test_fault_18_a_finite_step_resets_the_count_which_survives_a_checkpoint(make_trainer):
    trainer = make_trainer(total_episodes=24, num_epochs=1, max_skipped_steps=3, save_every=1)
    poison(trainer, lambda trainer, n: n in (0, 1, 3, 4))
    trainer.train()
    states = [json.loads((trainer.run.path / f"checkpoint-{i}" / "state.json").read_text()) for i in (1, 2, 3)]
    assert [state["skipped_in_a_row"] for state in states] == [2, 1, 0]


def test_fault_18_stop_ends_the_run_at_the_first_non_finite_step(make_trainer):
    trainer = make_trainer(on_nonfinite="stop")
    poison(trainer, lambda trainer, n: n == 1)
    with pytest.raises(NonFiniteGradientError, match=r"1 consecutive optimizer steps.*checkpoint-1$"):
        trainer.train()
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {1}


def test_fault_18_rollback_returns_to_the_last_checkpoint_and_draws_other_responses(make_trainer):
    """Rollout 3 is bad as it was drawn: the run ends as though its draws had been the next ones from the start."""
    settings = {"total_episodes": 32, "on_nonfinite": "rollback", "max_skipped_steps": 2, "save_every": 2}
    whole = make_trainer(**settings)
    # After rollout 2, as roll_back leaves it.
    whole.callbacks.append(
        lambda trainer, _: setattr(trainer, "rollouts_made", trainer.rollouts_made + (trainer.iteration == 2))
    )
    whole.train()
    trainer = make_trainer(**settings)
    poison(trainer, lambda trainer, n: trainer.rollouts_made == 3)
    with pytest.warns(UserWarning, match=r"rollout 3.*Rolling back to .*checkpoint-2, with other random draws"):
        trainer.train()
    assert trainer.rollouts_made == 5 and trainer.iteration == 4
    assert trainer.model.value_scale == whole.model.value_scale and trainer.model.value_scale.count == 4
    assert same(weights(whole), weights(trainer)) and whole.run.read() == trainer.run.read()


@pytest.mark.filterwarnings("ignore:.*Rolling back")
def test_fault_18_rollbacks_end(make_trainer):
    trainer = make_trainer(on_nonfinite="rollback", max_skipped_steps=2, save_every=1)
    poison(trainer, lambda trainer, n: True)
    with pytest.raises(NonFiniteGradientError, match="checkpoint-1"):
        trainer.train()
    assert trainer.rollouts_made == MAX_ROLLBACKS + 1
    assert (trainer.run.path / "checkpoint-0").is_dir()


@pytest.mark.filterwarnings("ignore:.*Rolling back")
def test_a_run_that_was_rolled_back_goes_on_being_watched(make_trainer, monkeypatch):
    trainer = make_trainer(total_episodes=24, on_nonfinite="rollback", max_skipped_steps=2, save_every=1)
    poison(trainer, lambda trainer, n: trainer.rollouts_made == 3)
    begun, begin = [], rlhf_ppo.trainer.begin_watch
    monkeypatch.setattr(
        rlhf_ppo.trainer, "begin_watch", lambda run, *before: begun.append(begin(run, *before)) or begun[-1]
    )
    trainer.train()
    assert [watch.updates for watch in begun] == [2, 3]  # the second goes on counting


def test_non_finite_weights_are_never_saved(make_trainer):
    trainer = make_trainer(save_every=1, total_episodes=24)
    gradient = trainer.fixed.gradient

    def overflowing(*inputs: Any, **settings: Any) -> Any:
        result = gradient(*inputs, **settings)
        if trainer.iteration == 1:
            trainer.optimizer.param_groups[0]["lr"] = 3e38
        return result

    trainer.fixed = dataclasses.replace(trainer.fixed, gradient=overflowing)
    with pytest.raises(
        NonFiniteGradientError, match=r"after the update on rollout 2 the weights .* and \d+ more are non-finite"
    ):
        trainer.train()
    assert nonfinite_parameters(trainer.model)
    assert sorted(f.name for f in trainer.run.path.glob("checkpoint-*")) == ["checkpoint-1"]
    assert not (trainer.run.path / "model.safetensors").exists()


def test_non_finite_parameters_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert nonfinite_parameters(model) == []
    with torch.no_grad():
        model[1].bias[1] = NAN
        model[0].weight[0, 1] = float("inf")
        model[0].bias[0] = -3e38  # large, but a number
    assert nonfinite_parameters(model) == ["0.weight", "1.bias"]
    model[1].bias.requires_grad_(False)
    assert nonfinite_parameters(model) == ["0.weight"]


def test_a_watch_looks_at_each_step_once_and_one_step_late():
    told: list[int] = []
    watch = StepWatch(1, limit=3, on_skip=lambda step: told.append(step.number))
    good, bad = torch.tensor(True), torch.tensor(False)
    watch.add(bad, [0], {})
    assert told == [] and watch.consecutive == 1
    watch.settle()
    watch.settle()
    assert told == [1] and watch.consecutive == 2 and not watch.gave_up
    watch.add(bad, [1], {})
    watch.add(good, [2], {})  # looks at the one before
    assert told == [1, 2] and watch.gave_up
    watch.settle()
    assert (watch.consecutive, watch.steps, watch.skipped, watch.gave_up) == (0, 3, 2, False)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ({"max_kl_nats_per_response": 1e-3}, r"KL to the reference is .* above max_kl_nats_per_response=0.001"),
        ({"min_entropy_nats_per_token": 9.0}, r"entropy is .* below min_entropy_nats_per_token=9\.0"),
    ],
)
def test_fault_20_a_budget_stops_the_run_with_a_checkpoint(make_trainer, bound, message):
    """The KL is 0 in the first rollout and not in the second; the entropy of 30 characters is below ln 30 = 3.4."""
    trainer = make_trainer(total_episodes=32, **bound)
    at = 2 if "max_kl_nats_per_response" in bound else 1
    with pytest.raises(PolicyDriftError, match=message + rf".*checkpoint-{at}$"):
        trainer.train()
    assert trainer.iteration == at == len(trainer.run.read())
    whole = make_trainer(total_episodes=32)
    whole.train()
    resumed = make_trainer(total_episodes=32, output_dir=str(trainer.run.path))
    resumed.train(resume_from_checkpoint=trainer.run.path / f"checkpoint-{at}")
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_nonfinite": "rollback"}, "on_nonfinite='rollback' resumes from a checkpoint, but save_every=0"),
        ({"on_nonfinite": "stop", "max_skipped_steps": 3}, "on_nonfinite='stop'.*max_skipped_steps=3"),
        ({"on_nonfinite": "panic"}, "unknown on_nonfinite 'panic'; known: skip, rollback, stop"),
        ({"max_skipped_steps": 0}, "max_skipped_steps must be 1 or more"),
        ({"max_kl_nats_per_response": 0.0}, "max_kl_nats_per_response must be positive or None"),
    ],
)
def test_contradictions_are_refused(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)
