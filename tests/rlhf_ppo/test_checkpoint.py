"""Checkpoints: a run that was cut and resumed ends exactly where the uncut one does; nothing else starts silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

SETTINGS = {"total_episodes": 32, "save_every": 2, "kl_target": 1.0, "target_kl": 0.01, "objective": "adaptive_clip"}


def trained(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]


def test_resumed_run_equals_the_uncut_one(make_trainer):
    whole = make_trainer(**SETTINGS)
    whole.train()
    cut = make_trainer(**SETTINGS, callbacks=[lambda trainer, metrics: trainer.iteration == 3])
    cut.train()
    resumed = make_trainer(**{**SETTINGS, "output_dir": cut.args.output_dir})
    resumed.train(resume_from_checkpoint=cut.run.path / "checkpoint-2")
    for name, weight in trained(whole).items():
        assert torch.equal(weight, trained(resumed)[name]), name
    # Rollout 3 was made twice, once before the cut and once after: it is in the metrics once.
    assert lines(resumed.args.output_dir) == lines(whole.args.output_dir)
    assert (whole.kl_coef, whole.objective.clip_range) == (resumed.kl_coef, resumed.objective.clip_range)


def test_a_resumed_run_keeps_its_adam_moments(make_trainer):
    trainer = make_trainer(**SETTINGS)
    trainer.train()
    resumed = make_trainer(**SETTINGS)
    from rlhf_ppo.checkpoint import load_checkpoint

    load_checkpoint(resumed, trainer.run.path / "checkpoint-4")
    before, after = trainer.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert before.keys() == after.keys() and len(before) > 0
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])


def test_a_missing_checkpoint_is_an_error_and_leaves_the_run_alone(make_trainer, tmp_path):
    trainer = make_trainer()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-7.*trainable.safetensors is not there"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-7")
    assert trainer.iteration == 0 and not (trainer.run.path / "metrics.jsonl").exists()


def test_a_checkpoint_of_another_model_is_refused(make_trainer, make_model):
    trainer = make_trainer(**SETTINGS)
    trainer.train()
    other = make_trainer(model=make_model("llama"))
    with pytest.raises(ValueError, match="another model"):
        other.train(resume_from_checkpoint=trainer.run.path / "checkpoint-2")


def test_checkpoints_hold_no_pickle(make_trainer):
    trainer = make_trainer(**SETTINGS)
    trainer.train()
    files = {file.name for file in (trainer.run.path / "checkpoint-2").iterdir()}
    assert files == {"trainable.safetensors", "optimizer.safetensors", "state.json"}
