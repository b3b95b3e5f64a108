"""Settings that change once an agent exists: which ones can, and which adapted coefficients are kept."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from classic.config import PPOArgs, filled
from classic.envs.checks import require_fit
from classic.presets.resolve import unread
from classic.state import Run, TrainState
from rlhf_ppo.core import PPOConfig
from rlhf_ppo.runtime.machine.device import resolve_device

WEIGHT_SETTINGS = (
    "network",
    "hidden_sizes",
    "value_hidden_sizes",
    "activation",
    "shared_network",
    "recurrent",
    "recurrent_size",
    "squash",
    "log_std_init",
    "state_dependent_std",
    "use_sde",
    "normalize_observations",
)
"""Settings that the weights were made with or trained for."""

COPY_SETTINGS = (
    "device",
    "seed",
    "num_envs",
    "autoreset_mode",
    "vectorization",
    "env_kwargs",
    "wrappers",
    "training_wrappers",
    "action_masks",
    "normalize_rewards",
)
"""Settings that environments, generators and statistics were made with."""

ADAPTED_BY = {"clip_range": "adaptive_clip", "penalty_beta": "penalty"}
"""Coefficient -> the objective that adapts it."""


def adapted_coefficients(config: PPOConfig) -> dict[str, float]:
    """Return the coefficients that objectives adapt, as they are now."""
    return {name: getattr(config, name) for name in ADAPTED_BY}


def kept_coefficients(
    before: Mapping[str, Any], after: Mapping[str, Any], adapted: Mapping[str, float]
) -> dict[str, float]:
    """Return the adapted coefficients that a change of settings leaves alone; a new value replaces them.

    Args:
        before, after: settings.
        adapted: coefficients as they are under ``before``.
    """
    return {
        name: adapted[name]
        for name, objective in ADAPTED_BY.items()
        if before.get("objective") == after.get("objective") == objective and before.get(name) == after.get(name)
    }


def differing(before: PPOArgs, after: PPOArgs, names: Iterable[str]) -> list[str]:
    """List the settings of ``names`` that differ."""
    return [name for name in names if getattr(before, name) != getattr(after, name)]


def change_args(run: Run, state: TrainState, args: PPOArgs) -> Run:
    """Return the run with other resolved settings, which count from the next rollout on.

    Raises:
        ValueError: the weights or the environments were made with another value, or it does not fit them.
    """
    if fixed := differing(run.args, args, (*WEIGHT_SETTINGS, *COPY_SETTINGS)):
        raise ValueError(
            f"the agent was made with {', '.join(f'{name}={getattr(run.args, name)!r}' for name in fixed)}, which "
            "cannot change any more: make a new agent; settings that its weights do not depend on "
            f"({', '.join(COPY_SETTINGS)}) can change when a saved one is loaded, as PPO.load(folder, num_envs=2)"
        )
    require_fit(args, run.envs)
    kept = kept_coefficients(vars(run.args), vars(args), adapted_coefficients(state.config))
    state.config = dataclasses.replace(args.ppo_config(), **kept)
    state.normalizer.gamma = state.config.gamma
    state.follow_value_setting(filled(args.normalize_values))
    return dataclasses.replace(run, args=args)


def on_this_machine(args: PPOArgs) -> PPOArgs:
    """Return a saved agent's settings, on the CPU if its device is not here: weights are the same anywhere."""
    try:
        resolve_device(args.device)
    except ValueError as error:
        warnings.warn(f"{error}: the agent is loaded on the CPU", stacklevel=3)
        return dataclasses.replace(args, device="cpu")
    return args


def with_changes(saved: PPOArgs, changes: Mapping[str, Any], *, where: str) -> PPOArgs:
    """Apply changes to a saved agent's settings; a setting that nothing reads any more is the preset's again.

    Args:
        saved: the settings as saved.
        changes: setting -> new value.
        where: the agent's folder, for messages.
    Raises:
        TypeError: there is no such setting; names the closest.
        ValueError: a value is out of range, or the weights were made with another one.
    """
    known = [field.name for field in dataclasses.fields(PPOArgs)]
    for name in changes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"there is no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    changed = dataclasses.replace(saved, **changes)
    if fixed := [name for name in differing(saved, changed, WEIGHT_SETTINGS) if getattr(changed, name) is not None]:
        was = ", ".join(f"{name}={getattr(saved, name)!r}" for name in fixed)
        raise ValueError(
            f"the network in {where} was made with {was}: its weights mean nothing under another value, so remove "
            f"{', '.join(fixed)}, or train a new agent"
        )
    dropped = [name for name, _ in unread(vars(changed)) if name not in changes]
    if changed.objective == "reinforce" and "gae_lambda" not in changes:
        dropped.append("gae_lambda")
    weights = {name: getattr(saved, name) for name in WEIGHT_SETTINGS if name in changes}
    return dataclasses.replace(changed, **weights, **dict.fromkeys(dropped))
