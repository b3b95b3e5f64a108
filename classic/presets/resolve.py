"""Fill in settings that were not given: from the environment's preset (a YAML file here), else from DEFAULTS."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from classic.config import CONTINUOUS, PPOArgs
from classic.envs.make_env import registered_id
from rlhf_ppo.runtime.command_line.settings import read_yaml

FOLDER = Path(__file__).parent

# Common values for low-dimensional control tasks. Neither these nor presets set a field whose None already means "off",
# so that "off" can always be asked for.
DEFAULTS: dict[str, Any] = {
    "total_timesteps": 500_000,
    "wrappers": (),
    "training_wrappers": (),
    "num_envs": 8,
    "num_steps": 256,
    "learning_rate": 3e-4,
    "lr_schedule": "linear",
    "adam_eps": 1e-5,
    "weight_decay": 0.0,
    "hidden_sizes": (64, 64),
    "activation": "tanh",
    "shared_network": False,
    "recurrent": "none",
    "recurrent_size": 64,
    **CONTINUOUS,
    "sde_sample_freq": 4,
    "normalize_observations": False,
    "normalize_rewards": False,
    "normalize_values": True,
    "clip_range_schedule": "constant",
    "ent_coef_schedule": "constant",
    "recompute_advantages": False,
    "objective": "clip",
    "clip_range": 0.2,
    "dual_clip": 3.0,
    "penalty_beta": 1.0,
    "vf_coef": 0.5,
    "ent_coef": 0.0,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "normalize_advantages": True,
    "num_epochs": 10,
    "num_minibatches": 32,
    "max_grad_norm": 0.5,
}

FIXED_CLIP = ("clip", "dual_clip", "cispo", "dis")
"""Objectives whose clip range no controller moves."""

READ_BY = {
    "dual_clip": ("dual_clip",),
    "penalty_beta": ("penalty",),
    "clip_range": (*FIXED_CLIP, "adaptive_clip"),
    "clip_range_high": FIXED_CLIP,
}
"""Setting -> the only objectives that read it."""


def preset_ids() -> list[str]:
    """List the environments that have a preset."""
    return sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.yaml"))


@cache
def preset(env_id: str | None) -> dict[str, Any]:
    """Return an environment's preset; {} if it has none.

    Raises:
        ValueError: the file has an unknown key (with the closest known one), or a value of the wrong type.
    """
    name = None if env_id is None else registered_id(env_id)
    return read_yaml(FOLDER / f"{name}.yaml", PPOArgs) if name in preset_ids() else {}


def resolve(args: PPOArgs, env_id: str | None, *, single: bool = False) -> PPOArgs:
    """Fill every None in from the environment's preset, or else from the defaults, and check settings together.

    Args:
        args: settings as given.
        env_id: the environment; None: it has no preset.
        single: there can be only one copy, which takes as many steps per rollout as the preset's copies together.
    Warns:
        UserWarning: a2c or reinforce would use its data more than once.
    Raises:
        ValueError: settings contradict each other, or a value is out of range.
    """
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(PPOArgs)}
    given = {name: value for name, value in given.items() if value is not None}
    defaults = {**DEFAULTS, **preset(env_id)}
    if single and "num_envs" not in given:
        defaults["num_envs"], defaults["num_steps"] = 1, defaults["num_envs"] * defaults["num_steps"]
    filled = {**defaults, **given}
    _check_folder(filled)
    for name, why in unread(filled):
        if filled.get(name) != defaults.get(name):
            raise ValueError(f"{name}={given[name]} {why}: remove one of the two")
    _adjust_to_objective(filled, given)
    _adjust_minibatches(filled, given)
    resolved = PPOArgs(**filled)
    resolved.ppo_config()
    return resolved


def unread(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the settings that others leave without effect, and why."""
    objective = f"objective={settings['objective']!r}"
    for name, readers in READ_BY.items():
        if settings["objective"] not in readers:
            yield name, f"is read only by objective={' or '.join(map(repr, readers))}, but {objective}"
    if settings["objective"] == "cispo" and (high := settings.get("clip_range_high")) is not None:
        yield "clip_range", f"has no effect, since {objective} reads only clip_range_high={high}"
    if settings["vf_coef"] == 0:
        yield "clip_range_vf", "clips the value loss, but vf_coef=0 turns that off"
    if settings["shared_network"]:
        yield "value_hidden_sizes", "is for separate networks, but shared_network=True"
    if settings["use_sde"]:
        yield "state_dependent_std", "is another exploration than use_sde=True"
    else:
        yield "sde_sample_freq", "is read only by use_sde=True"
    if settings["recurrent"] == "none":
        yield "recurrent_size", "is read only by recurrent='lstm' or 'gru', but recurrent='none'"


def _check_folder(filled: Mapping[str, Any]) -> None:
    for name, needed in (("save_every", "output_dir"), ("save_total_limit", "save_every")):
        if filled.get(name) and not filled.get(needed):
            raise ValueError(
                f"{name}={filled[name]} is about checkpoints, but {needed}={filled.get(needed)}: set it, or remove "
                f"{name}"
            )
    if filled["report_to"] and filled.get("output_dir") is None:
        raise ValueError(f"report_to={filled['report_to']!r} sends metrics.jsonl's lines on, but output_dir is None")


def _adjust_to_objective(filled: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Set what an objective determines (one pass, Monte Carlo returns), unless given."""
    objective = filled["objective"]
    if filled["clip_range_schedule"] != "constant" and objective not in FIXED_CLIP:
        raise ValueError(
            f"clip_range_schedule={filled['clip_range_schedule']!r} needs a fixed clip range, but "
            f"objective={objective!r} has none: remove one of the two"
        )
    if objective in ("a2c", "reinforce"):
        filled["num_epochs"] = given.get("num_epochs", 1)
        if filled["num_epochs"] > 1:
            warnings.warn(
                f"objective={objective!r} has no ratio to correct for old data, so num_epochs="
                f"{filled['num_epochs']} reuses it off-policy; num_epochs=1 is exact",
                stacklevel=4,
            )
    if objective == "reinforce":
        if given.get("gae_lambda", 1.0) != 1.0:
            raise ValueError(
                f"objective='reinforce' learns from Monte Carlo returns, which is gae_lambda=1, but gae_lambda="
                f"{given['gae_lambda']}: remove it, or use objective='a2c'"
            )
        filled["gae_lambda"] = 1.0


def _adjust_minibatches(filled: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Lower a preset's num_minibatches to the number of sequences; refuse more minibatches than rows."""
    if filled["recurrent"] != "none" and filled["num_minibatches"] > filled["num_envs"]:
        if "num_minibatches" in given:
            raise ValueError(
                f"num_minibatches={filled['num_minibatches']} is more than num_envs={filled['num_envs']}, but with "
                f"recurrent={filled['recurrent']!r} minibatches are whole sequences, one per copy"
            )
        filled["num_minibatches"] = filled["num_envs"]
    if filled["num_minibatches"] > filled["num_envs"] * filled["num_steps"]:
        raise ValueError(
            f"num_minibatches={filled['num_minibatches']} is more than the rollout's {filled['num_envs']} x "
            f"{filled['num_steps']} steps (num_envs x num_steps)"
        )
