"""Checkpoints: what a PPOTrainer needs to go on exactly where it was, and which run may go on from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_ppo.config.removed import REMOVED
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.models.lora import by_present_names, earlier_name
from rlhf_ppo.runtime.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from rlhf_ppo.runtime.checkpoint_commit import write_checkpoint
from rlhf_ppo.runtime.resume import require_unchanged
from rlhf_ppo.runtime.seeding import global_rng_state, restore_rng_state

if TYPE_CHECKING:
    from rlhf_ppo.trainer import PPOTrainer

_COUNTERS = ("iteration", "episodes", "optimizer_steps", "rollouts_made", "skipped_in_a_row")

MAY_CHANGE = (
    *("output_dir", "total_episodes", "quiet", "num_threads", "microbatch_tokens"),
    "device",  # the one that is used is among the fingerprints
    *("save_every", "save_total_limit", "save_best", "eval_every", "samples_per_rollout"),
    *("http_timeout_s", "http_retries", "http_batch_size", "http_concurrency", "reward_timeout_s", "respond_timeout_s"),
    "report_to",
    *("gradient_checkpointing", "offload_activations"),
    *("on_nonfinite", "max_skipped_steps", "max_kl_nats_per_response", "min_entropy_nats_per_token"),
)
"""Settings that say how long, where and how fast a run goes, and what stops it; not what it learns."""


@dataclass(frozen=True)
class Boundary:
    """What moves during a rollout and must be as it was before it, if the rollout is to be made again."""

    rng: dict[str, Tensor]
    """The global generators: reward functions may draw from them."""
    score_caches: dict[str, list[tuple[str, Any]]]

    @classmethod
    def of(cls, trainer: PPOTrainer) -> Boundary:
        """As they are now."""
        caches = trainer.parts.score_caches.items()
        return cls(global_rng_state(), {name: cache.state_dict() for name, cache in caches})


def save_checkpoint(trainer: PPOTrainer, boundary: Boundary | None = None) -> Path:
    """Commit ``checkpoint-<iteration>`` into the run's folder (:func:`rlhf_ppo.runtime.checkpoint.write_checkpoint`).

    Args:
        trainer: between two updates, perhaps in the middle of a rollout.
        boundary: as it was before that rollout; None: as it is now.
    """
    boundary = boundary or Boundary.of(trainer)
    trainer.run.sync()  # the metric lines up to here must not be younger than the checkpoint
    state = {
        **{name: getattr(trainer, name) for name in _COUNTERS},
        "kl_coef": trainer.kl_coef,
        "clip_range": trainer.objective.clip_range,
        "penalty_beta": trainer.objective.penalty_beta,
        "score_statistics": trainer.score_statistics.state_dict(),
        "scheduler_steps": trainer.scheduler.last_epoch,
        "best": trainer.best,
        "score_caches": boundary.score_caches,
    }
    best = trainer.best
    return write_checkpoint(
        trainer.run.path,
        trainer.iteration,
        tensors={"trainable": _trainable(trainer.model), "optimizer": _moments(trainer), "rng": boundary.rng},
        state=state,
        settings=_settings(trainer.args),
        fingerprints=trainer.fingerprints,
        keep=trainer.args.save_total_limit,
        spare=() if best is None else (int(best["iteration"]),),
    )


def load_checkpoint(trainer: PPOTrainer, source: Checkpoint | str | Path, *, override: bool = False) -> None:
    """Put a trainer that was built with the same arguments where the checkpoint's was.

    Args:
        trainer: nothing of it is touched before everything is verified.
        source: the checkpoint, or its folder.
        override: go on although settings or data differ.
    Raises:
        FileNotFoundError: the folder is not there.
        CheckpointError: it is damaged, of another model, or of a run with other settings or data (shown as a diff).
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    settings = _settings(trainer.args)
    require_unchanged(
        checkpoint,
        settings=settings,
        fingerprints=trainer.fingerprints,
        defaults={f.name: f.default for f in dataclasses.fields(RLHFConfig) if f.default is not dataclasses.MISSING},
        removed=REMOVED,
        free=MAY_CHANGE,
        override=override,
    )
    _load_weights(trainer, checkpoint)
    state = checkpoint.state
    for name in _COUNTERS:
        setattr(trainer, name, state[name])
    # A setting that the user changed now wins over where a controller had moved it.
    same = {name for name in ("kl_coef", "clip_range", "penalty_beta") if settings[name] == checkpoint.settings[name]}
    if "kl_coef" in same:
        trainer.kl_coef = state["kl_coef"]
    moved = {name: state[name] for name in ("clip_range", "penalty_beta") if name in same}
    trainer.objective = dataclasses.replace(trainer.objective, **moved)
    trainer.score_statistics.load_state_dict(state["score_statistics"])
    trainer.best = state["best"]
    for name, answers in state["score_caches"].items():
        if name in trainer.parts.score_caches:
            trainer.parts.score_caches[name].load_state_dict(answers)
    _set_schedule(trainer, state["scheduler_steps"])
    restore_rng_state(checkpoint.tensors["rng"])


def _settings(args: RLHFConfig) -> dict[str, Any]:
    """The run's settings, without those that a subclass adds for the command line."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(RLHFConfig)}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _optimizer_names(trainer: PPOTrainer) -> list[str]:
    """Names of the optimizer's parameters, in its order."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return [names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]


def _moments(trainer: PPOTrainer) -> dict[str, Tensor]:
    names = _optimizer_names(trainer)
    entries = trainer.optimizer.state_dict()["state"].items()
    return {f"{key}:{names[i]}": value for i, entry in entries for key, value in entry.items()}


def _load_weights(trainer: PPOTrainer, checkpoint: Checkpoint) -> None:
    parameters = _trainable(trainer.model)
    weights = by_present_names(checkpoint.tensors["trainable"], parameters)
    if {n: p.shape for n, p in parameters.items()} != {n: w.shape for n, w in weights.items()}:
        different = sorted(set(parameters) ^ set(weights)) or "shapes"
        raise CheckpointError(f"checkpoint {checkpoint.folder} belongs to another model or adapter: {different} differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    places = {name: i for i, name in enumerate(_optimizer_names(trainer))}
    places |= {earlier_name(name): i for name, i in places.items() if name not in checkpoint.tensors["trainable"]}
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in checkpoint.tensors["optimizer"].items():
        kind, _, name = key.partition(":")
        entries.setdefault(places[name], {})[kind] = value
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": entries})


def _set_schedule(trainer: PPOTrainer, steps: int) -> None:
    """The schedule is a function of the optimizer steps; a run that was made longer goes on along its new one."""
    scheduler = trainer.scheduler
    rates = [base * factor(steps) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(
        {**scheduler.state_dict(), "last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates}
    )
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
