"""Save and load an agent: safetensors for numbers, JSON for the rest; nothing that could run code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from classic.changed_settings import adapted_coefficients, kept_coefficients
from classic.config import EARLIER, PPOArgs, filled
from classic.envs.images import image_layout
from classic.envs.spaces import scales_parts
from classic.networks.actor_critic import ActorCritic
from classic.networks.own_network import NetworkFactory, factory_name
from classic.state import Run, TrainState, describe_spaces
from rlhf_ppo.core import ValueScale
from rlhf_ppo.runtime.checkpoints.checkpoint import list_checkpoints
from rlhf_ppo.runtime.files import replacing_files
from rlhf_ppo.runtime.package import __version__

MODEL, OPTIMIZER, NORMALIZER, AGENT = (
    "model.safetensors",
    "optimizer.safetensors",
    "normalizer.safetensors",
    "agent.json",
)


@dataclass(frozen=True)
class SavedAgent:
    """What ``agent.json`` says."""

    folder: Path
    env_id: str
    args: PPOArgs
    spaces: dict[str, str]
    counters: dict[str, int]
    adapted: dict[str, float]
    """Coefficients that the objective had adapted."""
    layers: dict[str, str] | None
    """Name of each part of the network -> its class; None: saved by an earlier version."""
    frozen: list[str]
    """Parameters that were not trained."""
    value_scale: ValueScale | None
    """The critic's units."""


def save_agent(folder: str | Path, run: Run, state: TrainState) -> Path:
    """Write model, optimizer and normalizer (safetensors) and ``agent.json``; each file is replaced as a whole.

    Random generators and running episodes are not saved: training continues from here, but not bit for bit. What a run
    resumes from exactly is a checkpoint (:mod:`classic.checkpoint`).

    Raises:
        ValueError: the folder is a file.
        OSError: it could not be written (a full disk, mostly); an agent saved there before stays.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot save to {folder}: it is a file; name a folder")
    content = {  # keys are those of earlier versions, whose agents load, too
        "env_id": run.env_id,
        "made_from_id": isinstance(run.env, str),
        "version": __version__,
        "args": asdict(run.args),
        "spaces": describe_spaces(run.envs),
        "counters": state.counters,
        "in_force": adapted_coefficients(state.config),
        "layers": layer_types(state.network),
        "frozen": frozen_parameters(state.network),
        "value_scale": saved_scale(state.value_scale),
    }
    with replacing_files(folder) as new:
        save_file(_copies(state.network.state_dict()), new / MODEL)
        save_file(state.optimizer.state(), new / OPTIMIZER)
        save_file(state.normalizer.state(), new / NORMALIZER)
        (new / AGENT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def read_agent(folder: str | Path, *, env_given: bool, network: NetworkFactory | str | None = None) -> SavedAgent:
    """Read ``agent.json`` of a saved agent.

    Args:
        folder: the agent's.
        env_given: the environment is not made from the saved id.
        network: what makes the agent's own network, or its name.

    Raises:
        FileNotFoundError: no agent there.
        ValueError: the file is of another version, or the agent was made from an environment and none was given.
    """
    folder = Path(folder)
    if folder in list_checkpoints(folder.parent):
        raise FileNotFoundError(
            f"{folder} is a checkpoint, which --resume continues from; the saved agent is in {folder.parent} once "
            "the run has ended"
        )
    for name in (AGENT, MODEL, OPTIMIZER, NORMALIZER):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no saved agent in {folder}: {name} is missing; write one with agent.save({str(folder)!r})"
            )
    try:
        content = json.loads((folder / AGENT).read_text(encoding="utf-8"))
        if not env_given and not content["made_from_id"]:
            raise ValueError(
                f"the agent in {folder} was made from an environment object, {content['env_id']!r}: pass one as env"
            )
        return SavedAgent(
            folder,
            content["env_id"],
            PPOArgs(**{**EARLIER, **content["args"], **_network(folder, content["args"].get("network"), network)}),
            content["spaces"],
            dict(content["counters"]),
            content["in_force"],
            content.get("layers"),
            content.get("frozen", []),
            loaded_scale(content),
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / AGENT} was not written by this version ({__version__}): {error!r}") from error


def _network(folder: Path, saved: str | None, given: NetworkFactory | str | None) -> dict[str, str]:
    """Return the setting ``network`` of a saved agent, whose code the user must give: a folder names none to run."""
    if saved is None and given is None:
        return {}
    if saved is None:
        raise ValueError(f"network={given!r} was given, but the agent in {folder} has no network of its own: remove it")
    if given is None:
        raise ValueError(
            f"the agent in {folder} has a network of its own, made by {saved}, whose code is not in the folder: give "
            f"it, as PPO.load({str(folder)!r}, network={saved!r}) or --network {saved}"
        )
    return {"network": given if isinstance(given, str) else factory_name(given)}


def restore_agent(saved: SavedAgent, run: Run, state: TrainState) -> None:
    """Give a fresh agent the saved weights, moments, statistics and counters.

    Raises:
        ValueError: the environment's spaces or the tensors do not fit.
    """
    folder = saved.folder
    _check_fit(saved, run, state)
    try:
        weights = load_file(folder / MODEL)
        space = run.envs.observation_space
        # A network of one's own may have no weights at all.
        images = run.args.network is None and (image_layout(space) or scales_parts(space))
        if images and not any(".image." in name for name in weights):
            raise ValueError(
                f"{folder} was saved by a version that flattened the observations of environment {run.env_id!r}, "
                "which are read as images now: train it again"
            )
        state.network.load_state_dict(weights)
        freeze(state, saved.frozen)
        state.optimizer.load(load_file(folder / OPTIMIZER))
        statistics = load_file(folder / NORMALIZER)
        if not saved.args.normalize_rewards:  # if they are now, their statistics start afresh
            statistics |= {name: x for name, x in state.normalizer.state().items() if name.startswith("returns.")}
        state.normalizer.load(statistics)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"the tensors in {folder} cannot be read: {error}") from error
    state.counters, state.value_scale = saved.counters, saved.value_scale
    state.follow_value_setting(filled(run.args.normalize_values))
    state.config = replace(state.config, **kept_coefficients(vars(saved.args), vars(run.args), saved.adapted))


def _check_fit(saved: SavedAgent, run: Run, state: TrainState) -> None:
    spaces = describe_spaces(run.envs)
    if saved.spaces != spaces:
        raise ValueError(
            f"environment {run.env_id!r} has changed since {saved.folder} was saved: spaces were {saved.spaces}, "
            f"now {spaces}"
        )
    if saved.layers is None and scales_parts(run.envs.observation_space):
        raise ValueError(
            f"the agent in {saved.folder} is of an earlier version, which gave the network the images inside its "
            "observations unscaled: train it again"
        )
    now = layer_types(state.network)
    if saved.layers is not None and saved.layers != now:
        name = next(name for name in {**saved.layers, **now} if saved.layers.get(name) != now.get(name))
        was = f"{name} was {saved.layers.get(name, 'absent')}, now it is {now.get(name, 'absent')}"
        warnings.warn(
            f"the network saved in {saved.folder} had other layers than its settings make ({was}): it acts differently "
            "until they are put back into agent.network",
            stacklevel=4,
        )


def saved_scale(scale: ValueScale | None) -> dict[str, float] | None:
    """Return the critic's units as JSON, for :func:`loaded_scale`."""
    return None if scale is None else asdict(scale)


def loaded_scale(content: Mapping[str, Any]) -> ValueScale | None:
    """Return the critic's units; earlier versions had the reward's own."""
    scale = content.get("value_scale", {})
    return None if scale is None else ValueScale(**scale)


def layer_types(network: ActorCritic) -> dict[str, str]:
    """Return the name of each part of a network -> its class."""
    return {name: type(part).__name__ for name, part in network.named_modules()}


def frozen_parameters(network: ActorCritic) -> list[str]:
    """List the parameters that are not trained."""
    return [name for name, parameter in network.named_parameters() if not parameter.requires_grad]


def freeze(state: TrainState, names: Collection[str]) -> None:
    """Freeze these parameters and no others."""
    for name, parameter in state.network.named_parameters():
        parameter.requires_grad_(name not in names)
    state.follow_network()


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
