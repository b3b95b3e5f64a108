"""Saving and loading an agent: safetensors for numbers, JSON for the rest; nothing that could run code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from classic.changes import still_moved, with_changes
from classic.config import PPOArgs
from classic.envs.make_env import EnvLike
from classic.envs.spaces import scales_parts
from rlhf_ppo.runtime.checkpoint import list_checkpoints
from rlhf_ppo.runtime.files import replacing_files
from rlhf_ppo.runtime.package import __version__

if TYPE_CHECKING:
    from classic.ppo import PPO

MODEL, OPTIMIZER, NORMALIZER, AGENT = (
    "model.safetensors",
    "optimizer.safetensors",
    "normalizer.safetensors",
    "agent.json",
)


def save(agent: PPO, folder: str | Path) -> Path:
    """Write model, optimizer and normalizer (safetensors) and ``agent.json``; each file is replaced as a whole.

    Random generators and running episodes are not part of it: training goes on from here, but not bit for bit. What a
    run goes on from exactly is a checkpoint (:mod:`classic.checkpoint`).

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
        "layers": layer_types(agent),
        "frozen": frozen_parameters(agent),
    }
    with replacing_files(folder) as new:
        save_file(_copies(agent.network.state_dict()), new / MODEL)
        save_file(agent.optimizer.state(), new / OPTIMIZER)
        save_file(agent.normalizer.state(), new / NORMALIZER)
        (new / AGENT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def load(cls: type[PPO], folder: str | Path, env: EnvLike | None, changes: Mapping[str, Any]) -> PPO:
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
        env_id, saved_spaces, counters = content["env_id"], content["spaces"], content["counters"]
        moved, layers, frozen = content["in_force"], content.get("layers"), content.get("frozen", [])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / AGENT} was not written by this version ({__version__}): {error!r}") from error
    args = with_changes(saved, changes, where=str(folder))
    # To use an agent takes no tracker; where training goes on, one that is not there is a warning.
    agent = cls(env_id if env is None else env, replace(args, report_to=()))
    agent.args, agent.origin = replace(agent.args, report_to=args.report_to), f"settings as saved in {folder}"
    if saved_spaces != spaces(agent):
        raise ValueError(
            f"environment {agent.env_id!r} has changed since {folder} was saved: spaces were {saved_spaces}, "
            f"now {spaces(agent)}"
        )
    if layers is None and scales_parts(agent.envs.observation_space):
        raise ValueError(
            f"the agent in {folder} is of an earlier version, which gave the network the images inside its "
            "observations unscaled: train it again"
        )
    if layers is not None and layers != layer_types(agent):
        warnings.warn(
            f"the network saved in {folder} had other layers than its settings make ({_difference(layers, agent)}): it "
            "acts otherwise until they are put back into agent.network",
            stacklevel=3,
        )
    try:
        weights = load_file(folder / MODEL)
        if len(agent.envs.observation_shape) == 3 and not any(".image." in name for name in weights):
            raise ValueError(
                f"{folder} was saved by a version that flattened the observations of environment {agent.env_id!r}, "
                "which are read as images now: train it again"
            )
        agent.network.load_state_dict(weights)
        freeze(agent, frozen)
        agent.optimizer.load(load_file(folder / OPTIMIZER))
        statistics = load_file(folder / NORMALIZER)
        if not saved.normalize_rewards:  # if they are now, their statistics begin afresh
            statistics |= {name: x for name, x in agent.normalizer.state().items() if name.startswith("returns.")}
        agent.normalizer.load(statistics)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"the tensors in {folder} cannot be read: {error}") from error
    agent.counters = dict(counters)
    agent.config = replace(agent.config, **still_moved(vars(saved), vars(agent.args), moved))
    return agent


def layer_types(agent: PPO) -> dict[str, str]:
    """What an agent's network consists of: the name of each part -> its class."""
    return {name: type(part).__name__ for name, part in agent.network.named_modules()}


def frozen_parameters(agent: PPO) -> list[str]:
    """Names of the parameters that training leaves alone."""
    return [name for name, parameter in agent.network.named_parameters() if not parameter.requires_grad]


def freeze(agent: PPO, names: Collection[str]) -> None:
    """Freeze these parameters and no others."""
    for name, parameter in agent.network.named_parameters():
        parameter.requires_grad_(name not in names)
    agent.follow_network()


def _difference(layers: Mapping[str, str], agent: PPO) -> str:
    now = layer_types(agent)
    name = next(name for name in {**layers, **now} if layers.get(name) != now.get(name))
    return f"{name} was {layers.get(name, 'not there')}, now it is {now.get(name, 'not there')}"


def spaces(agent: PPO) -> dict[str, str]:
    """What an agent's environment must still look like when it is loaded."""
    return {"observation": str(agent.envs.observation_space), "action": str(agent.envs.action_space)}


def in_force(agent: PPO) -> dict[str, float]:
    """Where objective=adaptive_clip and objective=penalty have moved their coefficients to."""
    return {"clip_range": agent.config.clip_range, "penalty_beta": agent.config.penalty_beta}


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
