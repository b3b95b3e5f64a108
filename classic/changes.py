"""Settings that change once an agent is there: which ones can, and which coefficients stay where they were moved to."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from classic.config import PPOArgs, never_read

OF_WEIGHTS = (
    "hidden_sizes",
    "activation",
    "shared_network",
    "recurrent",
    "recurrent_size",
    "squash",
    "log_std_init",
    "state_dependent_std",
    "normalize_observations",
)
"""Settings that the weights were made with or trained for."""

OF_COPIES = (
    "seed",
    "num_envs",
    "autoreset_mode",
    "vectorization",
    "env_kwargs",
    "wrappers",
    "action_masks",
    "normalize_rewards",
)
"""Settings that environments, generators and statistics were made with."""

MOVED_BY = {"clip_range": "adaptive_clip", "penalty_beta": "penalty"}
"""Coefficient -> the objective that moves it."""


def still_moved(before: Mapping[str, Any], after: Mapping[str, Any], in_force: Mapping[str, float]) -> dict[str, float]:
    """The coefficients that a controller has moved and that other settings leave alone: a new value wins over it.

    Args:
        before, after: settings.
        in_force: coefficients as they are under ``before``.
    """
    return {
        name: in_force[name]
        for name, objective in MOVED_BY.items()
        if before.get("objective") == after.get("objective") == objective and before.get(name) == after.get(name)
    }


def differing(before: PPOArgs, after: PPOArgs, names: Iterable[str]) -> list[str]:
    """Which of some settings differ."""
    return [name for name in names if getattr(before, name) != getattr(after, name)]


def with_changes(saved: PPOArgs, changes: Mapping[str, Any], *, where: str) -> PPOArgs:
    """A saved agent's settings with changes; what nothing reads any more is the preset's again.

    Raises:
        TypeError: there is no such setting; says the closest.
        ValueError: a value is out of range, or the weights were made with another one. ``where`` the agent lies.
    """
    known = [field.name for field in dataclasses.fields(PPOArgs)]
    for name in changes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"there is no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    changed = dataclasses.replace(saved, **changes)
    if fixed := [name for name in differing(saved, changed, OF_WEIGHTS) if getattr(changed, name) is not None]:
        was = ", ".join(f"{name}={getattr(saved, name)!r}" for name in fixed)
        raise ValueError(
            f"the network in {where} was made with {was}: its weights mean nothing under another value, so remove "
            f"{', '.join(fixed)}, or train a new agent"
        )
    unread = [name for name, _ in never_read(vars(changed)) if name not in changes]
    if changed.objective == "reinforce" and "gae_lambda" not in changes:
        unread.append("gae_lambda")
    weights = {name: getattr(saved, name) for name in OF_WEIGHTS if name in changes}
    return dataclasses.replace(changed, **weights, **dict.fromkeys(unread))
