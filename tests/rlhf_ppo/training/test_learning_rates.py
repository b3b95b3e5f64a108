"""Learning rates: what is chosen by the model's size, that everything reads it, and that a resumed run keeps it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rlhf_ppo.config.rlhf import restore_settings
from rlhf_ppo.models.adapters.lora import lora_config
from rlhf_ppo.pipeline.demo import DemoArgs, demo_trainer
from rlhf_ppo.runtime.checkpoints.checkpoint import read_checkpoint
from rlhf_ppo.runtime.checkpoints.checkpoint_commit import write_checkpoint
from rlhf_ppo.training.models import learning_rates
from rlhf_ppo.training.models.learning_rates import critic_rate, policy_rate

MILLION = 10**6


def test_a_hundred_times_the_parameters_learn_at_a_tenth_of_the_rate():
    assert [policy_rate(n, adapter=False) for n in (2_500_000, 250_000_000, 25_000_000_000)] == [1e-4, 1e-5, 1e-6]
    assert [policy_rate(n, adapter=True) for n in (2_500_000, 250_000_000, 25_000_000_000)] == [1e-3, 1e-4, 1e-5]
    assert policy_rate(1000, adapter=False) == 1e-4


def test_the_critic_learns_ten_times_as_fast_as_the_whole_policy_and_never_slower():
    assert [critic_rate(rate, adapter=False) for rate in (0.0, 1e-6, 3e-5)] == [0.0, 1e-5, 3e-4]
    assert [critic_rate(rate, adapter=True) for rate in (0.0, 1e-5)] == [0.0, 1e-5]
    assert [critic_rate(rate, adapter=False) for rate in (1e-3, 0.05)] == [1e-3, 0.05]
    for size in (2 * MILLION, 135 * MILLION):  # trained whole or not, the model's values learn at one rate
        whole, adapter = (policy_rate(size, adapter=by) for by in (False, True))
        assert critic_rate(whole, adapter=False) == critic_rate(adapter, adapter=True)


@pytest.fixture
def of_200_million(monkeypatch):
    """Take each model for one of 200 million parameters, for which 1e-5 is chosen; lists what was counted."""
    counted = []

    def count(parameters):
        counted.append(sum(p.numel() for p in parameters))
        return 200 * MILLION

    monkeypatch.setattr(learning_rates, "count_parameters", count)
    return counted


def test_optimizer_metrics_summary_and_run_json_have_the_rates_that_were_chosen(make_trainer, of_200_million, capsys):
    trainer = make_trainer(learning_rate=None, quiet=False, lr_scheduler_type="constant", save_every=1)
    assert of_200_million == [sum(p.numel() for p in trainer.model.policy.parameters())]
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-5, 1e-4]
    metrics = trainer.train()
    assert (metrics["optim/learning_rate"], metrics["optim/value_learning_rate"]) == (1e-5, 1e-4)
    words = "1e-5 policy (chosen: 200 M parameters, full weights), 1e-4 critic (chosen: 10 times the policy's)"
    assert f"learning rate  {words}" in capsys.readouterr().err
    facts = json.loads((trainer.run.path / "run.json").read_text())
    saved = read_checkpoint(trainer.run.path / "checkpoint-1").settings
    for settings in (facts, saved, dataclasses.asdict(trainer.args)):
        assert (settings["learning_rate"], settings["value_learning_rate"]) == (1e-5, 1e-4)
    assert facts["learning_rates"] == words


def test_an_adapter_learns_ten_times_as_fast_and_is_not_counted(make_trainer, make_model, of_200_million):
    for critic in ("shared", "adapter"):
        trainer = make_trainer(learning_rate=None, peft_config=lora_config(4), critic=critic)
        assert of_200_million.pop() == sum(p.numel() for p in make_model().parameters())
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-4, 1e-4]
        assert trainer.fixed.learning_rates == (
            "1e-4 policy (chosen: 200 M parameters, adapter), 1e-4 critic (chosen: as the policy's)"
        )


@pytest.mark.parametrize(
    ("given", "rates", "words"),
    [
        ({"learning_rate": 0.0}, [0.0, 0.0], "0 policy, 0 critic (chosen: as the policy's)"),
        ({"learning_rate": 3e-6}, [3e-6, 3e-5], "3e-6 policy, 3e-5 critic (chosen: 10 times the policy's)"),
        ({"learning_rate": 3e-6, "value_learning_rate": 0.0}, [3e-6, 0.0], "3e-6 policy, 0 critic"),
        ({"value_learning_rate": 2e-3}, [1e-5, 2e-3], None),
        ({"learning_rate": 0.02, "vf_coef": 0.0}, [0.02, 0.02], "2e-2 policy"),
        ({"learning_rate": 0.02, "advantage_estimator": "reinforce"}, [0.02], "2e-2 policy"),
    ],
)
def test_a_rate_that_is_set_stays(make_trainer, of_200_million, given, rates, words):
    trainer = make_trainer(**{"learning_rate": None, **given})
    assert [group["lr"] for group in trainer.optimizer.param_groups] == rates
    assert words in (None, trainer.fixed.learning_rates)
    # Settings with the rates filled in can be made again, as a black box's are.
    assert restore_settings(json.loads(json.dumps(dataclasses.asdict(trainer.args)))) == trainer.args


def test_the_demo_learns_at_the_rate_that_is_chosen(tmp_path):
    trainer = demo_trainer(DemoArgs(output_dir=str(tmp_path), precision="fp32"))
    assert (trainer.args.learning_rate, trainer.args.value_learning_rate) == (1e-4, 1e-3)


# Resuming


@pytest.fixture
def stopped(make_trainer, of_200_million):
    """A run that ended after the first of its two rollouts; its rates were chosen."""
    trainer = make_trainer(learning_rate=None, save_every=1, callbacks=[lambda trainer, metrics: True])
    trainer.train()
    return trainer


def test_a_rate_left_open_again_or_set_to_the_same_number_resumes(stopped, make_trainer):
    for rate in (None, 1e-5):
        again = make_trainer(learning_rate=rate, output_dir=str(stopped.run.path))
        assert again.train(resume_from_checkpoint=stopped.run.path / "checkpoint-1")["progress/iteration"] == 2


def test_another_size_or_rate_is_refused(stopped, make_trainer, monkeypatch):
    monkeypatch.setattr(learning_rates, "count_parameters", lambda parameters: 2 * MILLION)
    message = r"\n  learning_rate: 1e-05 -> 0.0001\n  value_learning_rate: 0.0001 -> 0.001\n"
    with pytest.raises(ValueError, match=message):
        make_trainer(learning_rate=None).train(resume_from_checkpoint=stopped.run.path)


def test_in_a_checkpoint_of_an_earlier_version_no_rate_of_the_critic_means_the_policys(stopped, make_trainer, tmp_path):
    saved = read_checkpoint(stopped.run.path / "checkpoint-1")
    settings = {**saved.settings, "value_learning_rate": None}
    parts = {"tensors": saved.tensors, "state": saved.state, "fingerprints": saved.fingerprints}
    old = write_checkpoint(tmp_path / "old", 1, settings=settings, **parts)
    with pytest.raises(ValueError, match=r"old -> new\):\n  value_learning_rate: 1e-05 -> 0.0001\n"):
        make_trainer(learning_rate=1e-5).train(resume_from_checkpoint=old)
    trainer = make_trainer(learning_rate=1e-5, value_learning_rate=1e-5)
    assert trainer.train(resume_from_checkpoint=old)["progress/iteration"] == 2
