"""Checkpoints: what a run goes on from as if it had never stopped, running episodes included where possible."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from classic.changes import still_moved
from classic.envs.environments import Episode
from classic.envs.spaces import scales_parts
from classic.save import freeze, frozen_parameters, in_force, layer_types, spaces
from rlhf_ppo.runtime.checkpoint import Checkpoint, CheckpointError, as_json
from rlhf_ppo.runtime.checkpoint_commit import write_checkpoint
from rlhf_ppo.runtime.resume import require_unchanged
from rlhf_ppo.runtime.run_directory import RunDirectory

if TYPE_CHECKING:
    from classic.ppo import PPO

FREE = ("output_dir", "quiet", "num_threads", "save_every", "save_total_limit", "report_to", "eval_envs")
"""Settings that may differ when a run goes on."""

OF_EPISODES = ("num_envs", "autoreset_mode", "vectorization", "env_kwargs", "wrappers", "action_masks")
"""Settings that running episodes depend on."""


@dataclass
class Progress:
    """Where a call of :meth:`classic.PPO.learn` is."""

    total: int
    """Environment steps that the call was asked for."""
    first_step: int
    """Environment steps before the call."""
    skipped_in_a_row: int = 0
    """Gradients that were not finite, since the last one that was."""


def save_checkpoint(agent: PPO, run: RunDirectory, progress: Progress) -> Path:
    """Commit ``checkpoint-<iteration>`` into a run's folder."""
    run.sync()  # the metric lines up to here must not be younger than the checkpoint
    episodes, running = agent.envs.state()
    generators = {"training": agent.generator.get_state(), "predicting": agent.predict_generator.get_state()}
    memory = {} if agent.memory is None else {"state": agent.memory}
    return write_checkpoint(
        run.path,
        agent.counters["iteration"],
        tensors={
            "model": agent.network.state_dict(),
            "optimizer": agent.optimizer.state(),
            "normalizer": agent.normalizer.state(),
            "episodes": episodes,
            "generators": generators,
            "memory": memory,
        },
        state={
            "counters": agent.counters,
            "in_force": in_force(agent),
            "layers": layer_types(agent),
            "frozen": frozen_parameters(agent),
            "recent": [list(episode) for episode in agent.recent],
            "best_return": agent.best_return,
            "last_metrics": dict(agent.last_metrics),
            "progress": asdict(progress),
            "running": running,
        },
        settings={**asdict(agent.args), "total": progress.total},
        fingerprints={"env_id": agent.env_id, **spaces(agent)},
        keep=agent.args.save_total_limit,
    )


def load_checkpoint(agent: PPO, checkpoint: Checkpoint, total: int, *, override: bool = False) -> Progress:
    """Make a fresh agent the one that was saved.

    Args:
        agent: nothing of it is touched before everything is verified.
        checkpoint: its state.
        total: environment steps that the call which goes on is asked for.
        override: go on although settings or the environment differ.
    Warns:
        UserWarning: the running episodes could not be set up again, so new ones begin; or what ``override`` let pass.
    Raises:
        CheckpointError: it is of a run with other settings, steps or spaces (shown as a diff), or of another network.
    """
    settings = {**asdict(agent.args), "total": total}
    fingerprints = {"env_id": agent.env_id, **spaces(agent)}
    require_unchanged(checkpoint, settings=settings, fingerprints=fingerprints, free=FREE, override=override)
    tensors, state = checkpoint.tensors, checkpoint.state
    if "layers" not in state and scales_parts(agent.envs.observation_space):
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} is of an earlier version, which gave the network the images inside its "
            "observations unscaled: start the run again in another folder"
        )
    other_layers = state.get("layers", layer_types(agent)) != layer_types(agent)
    if other_layers or _shapes(agent.network.state_dict()) != _shapes(tensors["model"]):
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} belongs to another network: its layers or weights do not fit"
        )
    if missing := sorted(agent.normalizer.state().keys() - tensors["normalizer"].keys()):
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} has no statistics {', '.join(missing)}: normalisation cannot be turned on "
            "in the middle of a run"
        )
    agent.network.load_state_dict(tensors["model"])
    frozen = state.get("frozen", [])
    if thawed := sorted(set(frozen_parameters(agent)) - set(frozen)):
        warnings.warn(f"{', '.join(thawed)} train on: in {checkpoint.folder} they are not frozen", stacklevel=3)
    freeze(agent, frozen)
    agent.optimizer.load(tensors["optimizer"])
    agent.normalizer.load(tensors["normalizer"])
    agent.generator.set_state(tensors["generators"]["training"])
    agent.predict_generator.set_state(tensors["generators"]["predicting"])
    agent.counters = dict(state["counters"])
    moved = still_moved(checkpoint.settings, settings, state["in_force"])
    agent.config = replace(agent.config, **moved)
    agent.recent = deque((Episode(*episode) for episode in state["recent"]), maxlen=agent.recent.maxlen)
    agent.best_return, agent.last_metrics = state["best_return"], state["last_metrics"]
    before, now = (as_json({name: s.get(name) for name in OF_EPISODES}) for s in (checkpoint.settings, settings))
    same = before == now and checkpoint.fingerprints == as_json(fingerprints)
    if not same or not _restore_episodes(agent, tensors, state["running"]):
        warnings.warn(
            f"environment {agent.env_id!r} cannot be set up where {checkpoint.folder} left it, so new episodes begin: "
            "the run goes on from here, but not bit for bit",
            stacklevel=3,
        )
        agent.begin_episodes()
    return replace(Progress(**state["progress"]), total=total)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in tensors.items()}


def _restore_episodes(agent: PPO, tensors: dict[str, dict[str, Tensor]], running: dict[str, Any] | None) -> bool:
    if running is None or not agent.envs.restore(tensors["episodes"], running):
        return False
    agent.memory = tensors["memory"].get("state")
    return True
