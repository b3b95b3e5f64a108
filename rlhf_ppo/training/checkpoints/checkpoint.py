"""Checkpoints: a TrainState and the generators' state on disk, and which run may resume from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ppo.config.name_hints import REMOVED
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import ValueScale
from rlhf_ppo.models.adapters.lora import earlier_name, with_current_names
from rlhf_ppo.models.sharded.sharding import as_piece, local_part, read_part
from rlhf_ppo.runtime.checkpoints.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from rlhf_ppo.runtime.checkpoints.checkpoint_commit import write_checkpoint
from rlhf_ppo.runtime.checkpoints.resume import require_unchanged
from rlhf_ppo.runtime.checkpoints.stored_tensors import Piece
from rlhf_ppo.runtime.processes.group import ProcessGroup
from rlhf_ppo.runtime.seeding import global_rng_state, restore_rng_state
from rlhf_ppo.training.models.model_facts import model_facts
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState

_OF_ROLLOUTS = ("rollouts_made", "extra_prompts")

_COUNTERS = {
    **{name: name for name in ("iteration", "episodes", "optimizer_steps", *_OF_ROLLOUTS)},
    "skipped_in_a_row": "consecutive_skips",
}
"""Name in state.json -> name in TrainState."""

_COEFFICIENTS = ("kl_coef", "clip_range", "penalty_beta")

MAY_CHANGE = (
    *("output_dir", "total_episodes", "quiet", "num_threads", "microbatch_tokens"),
    "device",  # the one that is used is among the fingerprints
    "whole_rollout_rewards",
    *("save_every", "save_total_limit", "save_best", "eval_every", "samples_per_rollout"),
    *("record_tokens_every", "report"),
    *("save_rollouts", "save_rollouts_gb"),
    *("http_timeout_s", "http_retries", "http_batch_size", "http_concurrency", "reward_timeout_s"),
    *("respond_timeout_s", "respond_concurrency"),
    *("vllm_url", "vllm_timeout_s", "vllm_retries", "max_sampler_gap"),
    *("process_timeout_s", "report_to", "watch", "stop_on", "judge_responses"),
    *("gradient_checkpointing", "offload_activations", "sharding", "sharded_decoding", "compile"),
    *("on_nonfinite", "max_skipped_steps", "max_kl_nats_per_response", "min_entropy_nats_per_token"),
)
"""Settings that a resumed run may change: how long, where and how fast it runs, and what stops it."""


@dataclass(frozen=True)
class Boundary:
    """What a rollout changes, recorded between two updates: once restored, the rollout can be repeated."""

    rng: dict[str, Tensor]
    """The global generators: reward functions may draw from them."""
    score_caches: dict[str, list[tuple[str, Any]]]
    counters: dict[str, int]
    """What counts rollouts and their prompts: something may fail between them and the update."""

    @classmethod
    def of(cls, state: TrainState, run: Run) -> Boundary:
        """Return the boundary here."""
        caches = {name: cache.state_dict() for name, cache in run.score_caches.items()}
        return cls(global_rng_state(), caches, {name: getattr(state, name) for name in _OF_ROLLOUTS})


def save_checkpoint(
    state: TrainState, run: Run, boundary: Boundary | None = None, processes: ProcessGroup | None = None
) -> Path:
    """Commit ``checkpoint-<iteration>`` into the run's folder, as ``runtime/checkpoints/checkpoint_commit.py`` says.

    Args:
        state: between two updates, perhaps in the middle of a rollout.
        run: its folder, fingerprints and settings.
        boundary: as it was before that rollout; None: as it is now.
        processes: those that save; None: all of the run.
    """
    boundary = boundary or Boundary.of(state, run)
    run.folder.sync()  # the metric lines up to here must not be younger than the checkpoint
    best = state.best
    return write_checkpoint(
        run.folder.path,
        state.iteration,
        tensors={
            "trainable": {n: as_piece(p, local_part(p)) for n, p in state.model.saved_parameters().items()},
            "optimizer": _moments(state),
            "rng": boundary.rng,
        },
        state={
            **{key: getattr(state, name) for key, name in _COUNTERS.items()},
            **boundary.counters,
            **{name: getattr(state, name) for name in _COEFFICIENTS},
            "score_statistics": state.score_statistics.state_dict(),
            "value_scale": None if state.model.value_scale is None else vars(state.model.value_scale),
            "compiled": state.model.compiled,
            "scheduler_steps": state.scheduler.last_epoch,
            "best": best,
            "models": model_facts(state.model, run),
            "score_caches": boundary.score_caches,
            "curriculum_rollouts": None if run.train_prompts is None else run.train_prompts.order.growing,
        },
        settings=_settings(run.args),
        fingerprints=run.fingerprints,
        keep=run.args.save_total_limit,
        spare=() if best is None else (int(best["iteration"]),),
        processes=processes or run.processes,
    )


def load_checkpoint(state: TrainState, run: Run, source: Checkpoint | str | Path, *, override: bool = False) -> None:
    """Load a checkpoint of this run, or of one with the same settings and data, into ``state``.

    Args:
        state: unchanged until everything is verified.
        run: settings and fingerprints to compare with; its score caches are loaded, too.
        source: the checkpoint, or its folder.
        override: load although settings or data differ.
    Raises:
        FileNotFoundError: the folder does not exist.
        CheckpointError: it is damaged, of another model, or of a run with other settings or data (shown as a diff).
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    settings = _settings(run.args)
    saved_settings = checkpoint.settings
    if settings["value_learning_rate"] is not None and saved_settings.get("value_learning_rate") is None:
        # Written before there was a choice, when None meant the policy's.
        was = {"value_learning_rate": saved_settings.get("learning_rate")}
        checkpoint = dataclasses.replace(checkpoint, settings={**saved_settings, **was})
    require_unchanged(
        checkpoint,
        settings=settings,
        fingerprints=run.fingerprints,
        defaults={f.name: f.default for f in dataclasses.fields(RLHFConfig) if f.default is not dataclasses.MISSING},
        removed=REMOVED,
        free=(*MAY_CHANGE, "processes"),
        override=override,
    )
    _load_weights(state, checkpoint)
    saved = checkpoint.state
    for key, name in _COUNTERS.items():
        setattr(state, name, saved.get(key, 0))  # earlier versions had no extra_prompts
    for name in _COEFFICIENTS:
        # A setting that the user has changed wins over what a controller made of the old one.
        if settings[name] == checkpoint.settings[name]:
            setattr(state, name, saved[name])
    state.score_statistics.load_state_dict(saved["score_statistics"])
    # A checkpoint of before value scales holds a head in the reward's units.
    scale = saved.get("value_scale", {})
    state.model.value_scale = None if scale is None else ValueScale(**scale)
    if run.tries_compiling:
        state.model.compiled = saved.get("compiled")
    state.best = saved["best"]
    for name, answers in saved["score_caches"].items():
        if name in run.score_caches:
            run.score_caches[name].load_state_dict(answers)
    if all(settings[name] == saved_settings.get(name) for name in ("curriculum_column", "curriculum_span")):
        _keep_curriculum(run, saved.get("curriculum_rollouts"))
    _set_schedule(state, saved["scheduler_steps"])
    restore_rng_state(checkpoint.tensors["rng"])


def _keep_curriculum(run: Run, rollouts: int | None) -> None:
    """Let the prompts' window grow over as many rollouts as before: of a run made longer, its span is a smaller share.

    ``rollouts`` is None in checkpoints of before this was kept.
    """
    if run.train_prompts is not None and rollouts is not None:
        run.train_prompts.order = dataclasses.replace(run.train_prompts.order, growing=rollouts)


def _settings(args: RLHFConfig) -> dict[str, Any]:
    """Return the run's settings, without those that a subclass adds for the command line."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(RLHFConfig)}


def _optimized(state: TrainState) -> list[tuple[str, nn.Parameter]]:
    """Return the optimizer's parameters with their names, in its order."""
    named = {id(local_part(p)): (name, p) for name, p in state.model.named_parameters()}
    return [named[id(part)] for group in state.optimizer.param_groups for part in group["params"]]


def _moments(state: TrainState) -> dict[str, Tensor | Piece]:
    named = _optimized(state)
    entries = [(*named[i], entry) for i, entry in state.optimizer.state_dict()["state"].items()]
    # In an order that does not depend on whether the run was resumed, so that equal checkpoints are equal files.
    ordered = sorted(entries, key=lambda entry: entry[0])
    return {f"{key}:{name}": as_piece(p, x) for name, p, entry in ordered for key, x in sorted(entry.items())}


def _load_weights(state: TrainState, checkpoint: Checkpoint) -> None:
    """Load weights and moments; of sharded ones this process's parts alone, however the checkpoint is divided."""
    parameters, stored = state.model.saved_parameters(), checkpoint.tensors["trainable"]
    sources = with_current_names({name: name for name in stored}, parameters)
    shapes = {name: stored.shapes[source] for name, source in sources.items()}
    if {n: p.shape for n, p in parameters.items()} != shapes:
        different = sorted(set(parameters) ^ set(shapes)) or "shapes"
        raise CheckpointError(f"checkpoint {checkpoint.folder} belongs to another model or adapter: {different} differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            local_part(parameter).copy_(read_part(parameter, stored, sources[name]))
    optimized, moments = _optimized(state), checkpoint.tensors["optimizer"]
    places = {name: i for i, (name, _) in enumerate(optimized)}
    places |= {earlier_name(name): i for name, i in places.items() if name not in stored}
    entries: dict[int, dict[str, Tensor]] = {}
    for key in moments:
        kind, _, name = key.partition(":")
        place = places[name]
        entries.setdefault(place, {})[kind] = read_part(optimized[place][1], moments, key)
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": entries})


def _set_schedule(state: TrainState, steps: int) -> None:
    """Put the schedule at an optimizer step; a run that was made longer follows its new schedule from there."""
    scheduler = state.scheduler
    rates = [base * factor(steps) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(
        {**scheduler.state_dict(), "last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates}
    )
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
