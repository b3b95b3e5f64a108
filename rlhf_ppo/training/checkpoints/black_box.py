"""Black box: everything that a non-finite minibatch was computed from, saved to be replayed."""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_ppo.config.rlhf import RLHFConfig, restore_settings
from rlhf_ppo.core import BannedTokens, Experience
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.sharded.sharding import as_piece, local_part
from rlhf_ppo.runtime.checkpoints.checkpoint import read_checkpoint
from rlhf_ppo.runtime.checkpoints.checkpoint_commit import write_checkpoint
from rlhf_ppo.training.checkpoints.fingerprints import data_fingerprint
from rlhf_ppo.training.experience import Estimates
from rlhf_ppo.training.models.model_facts import model_facts
from rlhf_ppo.training.rewards import ScoreStatistics
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.stability import Step
from rlhf_ppo.training.state import TrainState

MAX_BLACK_BOXES = 3
"""At most this many in a run's folder: each holds weights and optimizer, and the first ones tell the most."""


@dataclass(frozen=True)
class BlackBox:
    """What :func:`write_black_box` kept of one optimizer step."""

    iteration: int
    """The rollout's number, from 1."""
    step: int
    """The optimizer step's number within the update, from 1."""
    numbers: dict[str, float]
    """The minibatch's losses and its gradient's norm."""
    estimates: dict[str, float]
    """The rollout's non-finite metrics."""
    rollout: Rollout
    old: Experience
    passes: list[list[int]]
    """The minibatch's rows, grouped into microbatches."""
    weights: Mapping[str, Tensor]
    """Those that the optimizer updates, before the step, and frozen parts of a separate critic."""
    objective: RLHFConfig
    """The settings of that update."""
    kl_coef: float
    score_statistics: ScoreStatistics
    """Those of the rollouts before."""
    warming_up: bool
    """Whether the critic alone was trained."""
    critic_alone: bool
    """Whether the step was one of the critic's own, after the policy's epochs."""
    bf16: bool
    device: str
    models: dict[str, Any]
    """Configurations and names from which to build the models."""
    data: str | None
    """Digest of the training data (:func:`rlhf_ppo.training.checkpoints.fingerprints.data_fingerprint`)."""


def write_black_box(state: TrainState, run: Run, rollout: Rollout, estimates: Estimates, step: Step) -> Path | None:
    """Write ``blackbox-<rollout>`` into the run's folder: whole, with checksums, or not at all.

    Nothing is written for a second step of the same rollout, nor beside ``MAX_BLACK_BOXES`` others; a full disk is a
    warning.

    Args:
        state: its weights are those that the step was computed with.
        run: names the models and the folder.
        rollout, estimates: what was trained on.
        step: which minibatch, and its losses.
    Returns:
        The folder, or None.
    """
    number = state.iteration + 1
    folder = run.folder.path / f"blackbox-{number}"
    enough = run.processes.on_first(
        lambda: folder.exists() or len(list(run.folder.path.glob("blackbox-*"))) >= MAX_BLACK_BOXES
    )
    if enough:
        return None
    # A critic that trains alone has frozen the policy for a while.
    moved = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    moved |= {id(local_part(p)) for p in state.model.saved_parameters().values()}
    weights = {name: p for name, p in state.model.named_parameters() if id(local_part(p)) in moved}
    moments = state.optimizer.state_dict()["state"]
    owners = {id(local_part(p)): p for p in weights.values()}
    order = [owners[id(part)] for group in state.optimizer.param_groups for part in group["params"]]
    facts = _facts(state, run, rollout, estimates, step)
    scratch = run.folder.path / ".tmp-blackbox"
    try:
        written = write_checkpoint(
            scratch,
            number,
            tensors={
                "trainable": {name: as_piece(p, local_part(p)) for name, p in weights.items()},
                "optimizer": {
                    f"{i}.{key}": as_piece(order[i], x) for i, entry in moments.items() for key, x in entry.items()
                },
                "rollout": _tensors(rollout),
                "experience": _tensors(estimates.experience),
            },
            state=facts,
            settings=dataclasses.asdict(run.args),
            processes=run.processes,
        )
        run.processes.on_first(lambda: os.rename(written, folder))
    except OSError as error:
        warnings.warn(f"the black box of rollout {number} could not be written: {error}", stacklevel=2)
        return None
    finally:
        if run.processes.first:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _facts(state: TrainState, run: Run, rollout: Rollout, estimates: Estimates, step: Step) -> dict[str, Any]:
    """Return what a black box holds beside tensors."""
    return {  # keys are those of earlier versions, whose black boxes replay, too
        "step": step.number,
        "passes": run.microbatches(state.model, rollout, step.rows),
        "estimates": estimates.nonfinite,
        "numbers": {name: float(x) for name, x in step.numbers.items()},
        "warming_up": state.warms_up(run.args),
        "critic_alone": step.critic_alone,
        "objective": dataclasses.asdict(state.effective_settings(run.args)),
        "kl_coef": state.kl_coef,
        "score_statistics": state.score_statistics.state_dict(),
        "generators": {"seed": run.args.seed, "rollout": state.rollouts_made, "shuffle": state.iteration},
        "bf16": run.bf16,
        "device": str(run.device),
        "models": model_facts(state.model, run),
        "versions": {name: version(name) for name in ("transformers", "peft", "safetensors")},
        "train_dataset": None if run.train_prompts is None else data_fingerprint(run.train_prompts),
        "barred_tokens": None if rollout.banned is None else list(rollout.banned.tokens),
        "prompts": rollout.prompts,
        "completions": rollout.completions,
        "score_parts": rollout.score_parts,
    }


def _tensors(record: Rollout | Experience) -> dict[str, Tensor]:
    found = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    if isinstance(record, Rollout) and record.banned is not None:
        found["barred"] = record.banned.where
    return {name: x for name, x in found.items() if isinstance(x, Tensor)}


def read_black_box(folder: str | Path) -> BlackBox:
    """Read what :func:`write_black_box` wrote, and verify its checksums.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is damaged, or not a black box.
    """
    box = read_checkpoint(folder)
    if not {"trainable", "rollout", "experience"} <= box.tensors.keys():
        raise ValueError(f"{folder} is not a black box: name a folder blackbox-<n> of a run")
    state, rollout, statistics = box.state, dict(box.tensors["rollout"]), ScoreStatistics()
    statistics.load_state_dict(state.get("score_statistics", {}))
    banned = rollout.pop("barred", None)
    return BlackBox(
        iteration=box.step,
        step=state["step"],
        numbers=state["numbers"],
        estimates=state["estimates"],
        rollout=Rollout(
            prompts=state["prompts"],
            columns={},
            completions=state["completions"],
            score_parts=state["score_parts"],
            banned=None if banned is None else BannedTokens(banned, tuple(state["barred_tokens"])),
            **_complete(rollout, "values"),
        ),
        old=Experience(**_complete(box.tensors["experience"], "values", "returns")),
        passes=state["passes"],
        weights=box.tensors["trainable"],
        objective=restore_settings(state["objective"]),
        kl_coef=state["kl_coef"],
        score_statistics=statistics,
        warming_up=state["warming_up"],
        critic_alone=state.get("critic_alone", False),
        bf16=state["bf16"],
        device=state["device"],
        models=state["models"],
        data=state.get("train_dataset"),
    )


def _complete(tensors: Mapping[str, Tensor], *optional: str) -> dict[str, Any]:
    """Fill fields without a default that the record did not have with None."""
    return {**dict.fromkeys(optional), **tensors}
