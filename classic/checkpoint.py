"""Checkpoints: save a run and resume it as if it had never stopped, running episodes included where possible."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from classic.changed_settings import adapted_coefficients, kept_coefficients
from classic.config import EARLIER, filled
from classic.envs.environments import Episode
from classic.envs.spaces import scales_parts
from classic.save import freeze, frozen_parameters, layer_types, loaded_scale, saved_scale
from classic.state import Progress, Run, TrainState, begin_episodes, describe_spaces
from rlhf_ppo.runtime.checkpoints.checkpoint import Checkpoint, CheckpointError, as_json
from rlhf_ppo.runtime.checkpoints.checkpoint_commit import write_checkpoint
from rlhf_ppo.runtime.checkpoints.resume import require_unchanged
from rlhf_ppo.runtime.logs.run_directory import RunDirectory

FREE_SETTINGS = (
    *("output_dir", "quiet", "num_threads", "device", "save_every", "save_total_limit", "report_to", "eval_envs"),
    *("episode_info", "report"),
)
"""Settings that may differ when a run resumes."""

EPISODE_SETTINGS = (
    "num_envs",
    "autoreset_mode",
    "vectorization",
    "env_kwargs",
    "wrappers",
    "training_wrappers",
    "action_masks",
)
"""Settings that running episodes depend on."""


def save_checkpoint(run: Run, state: TrainState, folder: RunDirectory) -> Path:
    """Commit ``checkpoint-<iteration>`` into a run's folder."""
    folder.sync()  # the metric lines up to here must not be younger than the checkpoint
    episodes, running = run.envs.state()
    generators = {"training": state.generator.get_state(), "predicting": state.predict_generator.get_state()}
    progress = state.progress
    return write_checkpoint(
        folder.path,
        state.counters["iteration"],
        tensors={
            "model": state.network.state_dict(),
            "optimizer": state.optimizer.state(),
            "normalizer": state.normalizer.state(),
            "episodes": episodes,
            "generators": generators,
            "memory": {} if state.memory is None else {"state": state.memory},
        },
        # Keys are those of earlier versions, whose checkpoints load, too.
        state={
            "counters": state.counters,
            "in_force": adapted_coefficients(state.config),
            "layers": layer_types(state.network),
            "frozen": frozen_parameters(state.network),
            "recent": [list(episode) for episode in state.recent],
            "value_scale": saved_scale(state.value_scale),
            "best_return": state.best_return,
            "last_metrics": dict(state.last_metrics),
            "stopped": state.stopped,
            "progress": {
                "total": progress.total,
                "first_step": progress.first_step,
                "skipped_in_a_row": progress.consecutive_skips,
            },
            "running": running,
        },
        settings={**asdict(run.args), "total": progress.total},
        fingerprints={"env_id": run.env_id, **describe_spaces(run.envs)},
        keep=run.args.save_total_limit,
    )


def load_checkpoint(run: Run, state: TrainState, checkpoint: Checkpoint, total: int, *, override: bool = False) -> None:
    """Restore a saved state into a fresh one.

    Args:
        run: settings and environments, whose running episodes are restored, too.
        state: unchanged until everything is verified.
        checkpoint: what was saved.
        total: environment steps of the resuming call.
        override: resume although settings or the environment differ.
    Warns:
        UserWarning: the running episodes could not be restored, so new ones begin; or what ``override`` let pass.
    Raises:
        CheckpointError: it is of a run with other settings, steps or spaces (shown as a diff), or of another network.
    """
    settings = {**asdict(run.args), "total": total}
    fingerprints = {"env_id": run.env_id, **describe_spaces(run.envs)}
    require_unchanged(
        checkpoint,
        settings=settings,
        fingerprints=fingerprints,
        defaults=EARLIER,
        free=FREE_SETTINGS,
        override=override,
    )
    _check_network(run, state, checkpoint)
    tensors, saved = checkpoint.tensors, checkpoint.state
    state.network.load_state_dict(tensors["model"])
    frozen = saved.get("frozen", [])
    if thawed := sorted(set(frozen_parameters(state.network)) - set(frozen)):
        warnings.warn(f"{', '.join(thawed)} train on: in {checkpoint.folder} they are not frozen", stacklevel=4)
    freeze(state, frozen)
    state.optimizer.load(tensors["optimizer"])
    state.normalizer.load(dict(tensors["normalizer"]))
    state.generator.set_state(tensors["generators"]["training"])
    state.predict_generator.set_state(tensors["generators"]["predicting"])
    state.counters, state.value_scale = dict(saved["counters"]), loaded_scale(saved)
    state.follow_value_setting(filled(run.args.normalize_values))
    state.config = replace(state.config, **kept_coefficients(checkpoint.settings, settings, saved["in_force"]))
    state.recent = deque((Episode(*episode) for episode in saved["recent"]), maxlen=state.recent.maxlen)
    state.best_return, state.last_metrics = saved["best_return"], saved["last_metrics"]
    state.stopped = saved.get("stopped", False)
    state.progress = Progress(total, saved["progress"]["first_step"], saved["progress"]["skipped_in_a_row"])
    before, now = (as_json({name: s.get(name) for name in EPISODE_SETTINGS}) for s in (checkpoint.settings, settings))
    same = before == now and checkpoint.fingerprints == as_json(fingerprints)
    if same and saved["running"] is not None and run.envs.restore(tensors["episodes"], saved["running"]):
        state.memory, state.playing = tensors["memory"].get("state"), True
    else:
        warnings.warn(
            f"environment {run.env_id!r} cannot be restored to where {checkpoint.folder} left it, so new episodes "
            "begin: the run continues, but not bit for bit",
            stacklevel=4,
        )
        begin_episodes(run, state)


def _check_network(run: Run, state: TrainState, checkpoint: Checkpoint) -> None:
    """Raise a CheckpointError unless the saved tensors fit the network and the normalizer."""
    tensors, layers = checkpoint.tensors, checkpoint.state.get("layers")
    if layers is None and scales_parts(run.envs.observation_space):
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} is of an earlier version, which gave the network the images inside its "
            "observations unscaled: start the run again in another folder"
        )
    other_layers = layers is not None and layers != layer_types(state.network)
    if other_layers or _shapes(state.network.state_dict()) != _shapes(tensors["model"]):
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} belongs to another network: its layers or weights do not fit"
        )
    if missing := sorted(state.normalizer.state().keys() - tensors["normalizer"].keys()):
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} has no statistics {', '.join(missing)}: normalisation cannot be turned on "
            "in the middle of a run"
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in tensors.items()}
