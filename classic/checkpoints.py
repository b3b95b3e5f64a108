"""Checkpoints: what a run goes on from as if it had never stopped, running episodes included where possible."""

from __future__ import annotations

import warnings
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from classic.envs import Episode
from classic.saving import in_force, load_optimizer, optimizer_tensors, spaces
from rlhf_ppo.runtime.checkpoint import (
    checkpoint_folder,
    list_checkpoints,
    newest_good,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from rlhf_ppo.runtime.unchanged import require_unchanged

if TYPE_CHECKING:
    from classic.train import PPO

FREE = ("output_dir", "quiet", "num_threads", "save_every", "save_total_limit")
"""Settings that may differ when a run goes on."""


@dataclass
class Progress:
    """Where a call of :meth:`classic.PPO.learn` is."""

    total: int
    """Environment steps that the call was asked for."""
    first_step: int
    """Environment steps before the call."""
    skipped_in_a_row: int = 0
    """Gradients that were not finite, since the last one that was."""


def save_checkpoint(agent: PPO, root: Path, progress: Progress) -> Path:
    """Commit ``checkpoint-<iteration>`` into a run's folder.

    One that is there already is this very one: the run was resumed from an earlier checkpoint, and goes the same way.
    """
    folder = checkpoint_folder(root, agent.counters["iteration"])
    if folder.exists() and not verify_checkpoint(folder):
        return folder
    episodes, running = agent.envs.state()
    generators = {"training": agent.generator.get_state(), "predicting": agent.predict_generator.get_state()}
    memory = {} if agent.memory is None else {"state": agent.memory}
    return write_checkpoint(
        root,
        agent.counters["iteration"],
        tensors={
            "model": agent.network.state_dict(),
            "optimizer": optimizer_tensors(agent),
            "normalizer": agent.normalizer.state(),
            "episodes": episodes,
            "generators": generators,
            "memory": memory,
        },
        state={
            "counters": agent.counters,
            "in_force": in_force(agent),
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


def find_checkpoint(root: str | Path | None, wanted: str | Path) -> Path | None:
    """The folder that ``resume_from_checkpoint`` means; None: "auto", and there is none yet.

    Raises:
        ValueError: "auto" without a run's folder.
        FileNotFoundError: the path is not there: it is never a reason to start afresh.
        CheckpointError: "auto", and no checkpoint is good.
    """
    if wanted == "auto":
        if root is None:
            raise ValueError("resume_from_checkpoint='auto' looks in output_dir, which is None: set it")
        return newest_good(root)
    folder = Path(wanted)
    if not folder.is_dir():
        there = ", ".join(path.name for path in list_checkpoints(folder.parent)) or "none"
        raise FileNotFoundError(f"checkpoint {folder} does not exist; there are: {there}")
    return folder


def load_checkpoint(agent: PPO, folder: Path, total: int) -> Progress:
    """Make a fresh agent the one that was saved.

    Warns:
        UserWarning: the running episodes could not be set up again, so new ones begin.
    Raises:
        CheckpointError: it is damaged, or of a run with other settings, steps or spaces.
    """
    checkpoint = read_checkpoint(folder)
    settings = {**asdict(agent.args), "total": total}
    require_unchanged(checkpoint, settings=settings, fingerprints={"env_id": agent.env_id, **spaces(agent)}, free=FREE)
    tensors, state = checkpoint.tensors, checkpoint.state
    agent.network.load_state_dict(tensors["model"])
    load_optimizer(agent, tensors["optimizer"])
    agent.normalizer.load(tensors["normalizer"])
    agent.generator.set_state(tensors["generators"]["training"])
    agent.predict_generator.set_state(tensors["generators"]["predicting"])
    agent.counters = dict(state["counters"])
    agent.config = replace(agent.config, **state["in_force"])
    agent.recent = deque((Episode(*episode) for episode in state["recent"]), maxlen=agent.recent.maxlen)
    agent.best_return, agent.last_metrics = state["best_return"], state["last_metrics"]
    if not _restore_episodes(agent, tensors, state["running"]):
        warnings.warn(
            f"environment {agent.env_id!r} cannot be set up where {folder} left it, so new episodes begin: the run "
            "goes on from here, but not bit for bit",
            stacklevel=3,
        )
        agent.begin_episodes()
    return Progress(**state["progress"])


def _restore_episodes(agent: PPO, tensors: dict[str, dict[str, torch.Tensor]], running: dict[str, Any] | None) -> bool:
    if running is None or not agent.envs.restore(tensors["episodes"], running):
        return False
    agent.memory = tensors["memory"].get("state")
    return True
