"""Checkpoints: what a run needs to go on exactly where it was, as safetensors and JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from rlhf_ppo.trainer import PPOTrainer

_COUNTERS = ("iteration", "episodes", "optimizer_steps", "rollouts_made", "skipped_in_a_row")


def save_checkpoint(trainer: PPOTrainer) -> Path:
    """Write ``checkpoint-<iteration>`` into the run's folder; it appears under that name only when it is complete."""
    folder = trainer.run.path / f"checkpoint-{trainer.iteration}"
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(weights, temporary / "trainable.safetensors")
    optimizer = trainer.optimizer.state_dict()["state"]
    moments = {f"{i}.{key}": value.contiguous() for i, entry in optimizer.items() for key, value in entry.items()}
    save_file(moments, temporary / "optimizer.safetensors")
    state = {
        **{name: getattr(trainer, name) for name in _COUNTERS},
        "kl_coef": trainer.kl_coef,
        "clip_range": trainer.objective.clip_range,
        "penalty_beta": trainer.objective.penalty_beta,
        "score_statistics": trainer.score_statistics.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
    }
    (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return folder


def load_checkpoint(trainer: PPOTrainer, folder: str | Path) -> None:
    """Put a trainer that was built with the same arguments where the checkpoint's was.

    Raises:
        FileNotFoundError: the folder or one of its files is not there; a run never starts afresh instead.
        ValueError: the checkpoint's parameters are not this model's.
    """
    folder = Path(folder)
    for name in ("trainable.safetensors", "optimizer.safetensors", "state.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"resume_from_checkpoint={folder}: {name} is not there, so this is no checkpoint")
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    weights = load_file(folder / "trainable.safetensors")
    if {n: p.shape for n, p in parameters.items()} != {n: w.shape for n, w in weights.items()}:
        different = sorted(set(parameters) ^ set(weights)) or "shapes"
        raise ValueError(f"checkpoint {folder} belongs to another model or adapter: {different} differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    optimizer = trainer.optimizer.state_dict()
    optimizer["state"] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        optimizer["state"].setdefault(int(index), {})[name] = value
    trainer.optimizer.load_state_dict(optimizer)
    trainer.scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(trainer.optimizer.param_groups, state["scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    for name in _COUNTERS:
        setattr(trainer, name, state[name])
    trainer.kl_coef = state["kl_coef"]
    trainer.score_statistics.load_state_dict(state["score_statistics"])
    trainer.objective = dataclasses.replace(
        trainer.objective, clip_range=state["clip_range"], penalty_beta=state["penalty_beta"]
    )
