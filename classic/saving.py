"""Saving and loading an agent: safetensors for numbers, JSON for the rest; nothing that could run code."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from classic.config import PPOArgs, never_read
from classic.making import EnvLike
from rlhf_ppo import __version__
from rlhf_ppo.runtime.checkpoint import list_checkpoints
from rlhf_ppo.runtime.files import replacing_files

if TYPE_CHECKING:
    from classic.train import PPO

MODEL, OPTIMIZER, NORMALIZER, AGENT = (
    "model.safetensors",
    "optimizer.safetensors",
    "normalizer.safetensors",
    "agent.json",
)


def save(agent: PPO, folder: str | Path) -> Path:
    """Write model, optimizer and normalizer (safetensors) and ``agent.json``; each file is replaced as a whole.

    Random generators and running episodes are not part of it: training goes on from here, but not bit for bit. What a
    run goes on from exactly is a checkpoint (:mod:`classic.checkpoints`).

    Raises:
        ValueError: the folder is a file.
        OSError: it could not be written (a full disk, mostly); an agent that lies there already stays.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot save to {folder}: it is a file; name a folder")
    content = {
        "env_id": agent.env_id,
        "made_from_id": isinstance(agent.env, str),
        "version": __version__,
        "args": asdict(agent.args),
        "spaces": spaces(agent),
        "counters": agent.counters,
        "in_force": in_force(agent),
    }
    with replacing_files(folder) as new:
        save_file(_copies(agent.network.state_dict()), new / MODEL)
        save_file(agent.optimizer.state(), new / OPTIMIZER)
        save_file(agent.normalizer.state(), new / NORMALIZER)
        (new / AGENT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def load(cls: type[PPO], folder: str | Path, env: EnvLike | None = None) -> PPO:
    """Build the agent in ``folder``; errors are those of :meth:`classic.PPO.load`."""
    folder = Path(folder)
    if folder in list_checkpoints(folder.parent):
        raise FileNotFoundError(
            f"{folder} is a checkpoint, which --resume goes on from; the saved agent lies in {folder.parent} once the "
            "run has ended"
        )
    for name in (AGENT, MODEL, OPTIMIZER, NORMALIZER):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no saved agent in {folder}: {name} is missing; write one with agent.save({str(folder)!r})"
            )
    try:
        content = json.loads((folder / AGENT).read_text(encoding="utf-8"))
        if env is None and not content["made_from_id"]:
            raise ValueError(
                f"the agent in {folder} was made from an environment object, {content['env_id']!r}: pass one as env"
            )
        saved = PPOArgs(**content["args"])
        # What the preset had filled in although nothing reads it would contradict the rest under another preset.
        read = replace(saved, **{name: None for name, _ in never_read(vars(saved))})
        # To use an agent takes no tracker; where training goes on, one that is not there is a warning.
        agent = cls(content["env_id"] if env is None else env, replace(read, report_to=()))
        agent.args = replace(agent.args, report_to=saved.report_to)
        saved_spaces, counters, moved = content["spaces"], content["counters"], content["in_force"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / AGENT} was not written by this version ({__version__}): {error!r}") from error
    if saved_spaces != spaces(agent):
        raise ValueError(
            f"environment {agent.env_id!r} has changed since {folder} was saved: spaces were {saved_spaces}, "
            f"now {spaces(agent)}"
        )
    try:
        agent.network.load_state_dict(load_file(folder / MODEL))
        agent.optimizer.load(load_file(folder / OPTIMIZER))
        agent.normalizer.load(load_file(folder / NORMALIZER))
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"the tensors in {folder} cannot be read: {error}") from error
    agent.counters = dict(counters)
    agent.config = replace(agent.config, **moved)
    return agent


def spaces(agent: PPO) -> dict[str, str]:
    """What an agent's environment must still look like when it is loaded."""
    return {"observation": str(agent.envs.observation_space), "action": str(agent.envs.action_space)}


def in_force(agent: PPO) -> dict[str, float]:
    """Where objective=adaptive_clip and objective=penalty have moved their coefficients to."""
    return {"clip_range": agent.config.clip_range, "penalty_beta": agent.config.penalty_beta}


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
