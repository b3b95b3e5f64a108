"""Warnings of what an environment and the settings do without a word: masks nobody reads, pixels nobody scales, ..."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Tuple

from classic.envs.images import unscaled
from classic.envs.masks import unread_masks

if TYPE_CHECKING:
    from classic.config import PPOArgs
    from classic.envs.environments import Environments

REACH = 3.0
"""Standard deviations within which a Gaussian policy explores."""
EXPLORED = 0.5
"""Share of the range between the bounds that it should explore at least."""
INSIDE = 0.1
"""Share of its draws that should lie between the bounds at least."""


def warn_before_training(envs: Environments, args: PPOArgs) -> None:
    """Warn of what would train, but on other numbers or rules than meant."""
    for words in _findings(envs, args):
        warnings.warn(f"environment {envs.env_id!r}: {words}", stacklevel=4)


def _findings(envs: Environments, args: PPOArgs) -> Iterator[str]:
    if names := envs.own_statistics():
        yield (
            f"each copy has statistics of its own in {' and '.join(names)}: they are not saved, begin anew in "
            "evaluations and loaded agents, and returns may be shown scaled. Use normalize_observations=True and "
            "normalize_rewards=True instead, whose statistics belong to the agent"
        )
    if envs.actions.choices and args.action_masks is not False:
        for name in unread_masks(envs.observation_space, envs.actions):
            yield (
                f"the part {name!r} of its observations looks like a mask of actions, but is read as numbers: give "
                f"infos['action_mask'], a method action_masks(), or a part 'action_mask' of {envs.actions.num_outputs} "
                "zeros and ones; action_masks=False says that it is none"
            )
    if not args.normalize_observations:
        for part in _boxes(envs.observation_space):
            if (why := unscaled(part)) is not None:
                yield f"its observations {_short(part)} {why}"
    space = envs.action_space
    if isinstance(space, Box) and not args.squash and (why := unexplored(space, args.log_std_init or 0.0)) is not None:
        yield f"its actions {_short(space)} {why}"


def unexplored(space: Box, log_std: float) -> str | None:
    """Why a Gaussian policy that begins around 0 cannot try all actions between these bounds; None: it can."""
    if not np.isfinite([space.low, space.high]).all():
        return (
            "have no bounds, so the policy begins around 0 with a standard deviation of exp(log_std_init) whatever "
            "their scale: give them bounds (TransformAction) and set squash=True, or set log_std_init"
        )
    std = math.exp(log_std)
    for low, high in zip(space.low.flat, space.high.flat, strict=True):
        reach = REACH * max(std, 1.0)
        explored = (min(high, reach) - max(low, -reach)) / (high - low) if high > low else 1.0
        inside = (math.erf(high / std / math.sqrt(2)) - math.erf(low / std / math.sqrt(2))) / 2
        if explored < EXPLORED or inside < INSIDE:
            return (
                f"go from {low:g} to {high:g}, but the policy begins around 0 with a standard deviation of {std:g}, "
                "clipped to them: set squash=True, which covers the bounds, or rescale them to -1..1 (RescaleAction)"
            )
    return None


def _boxes(space: gymnasium.Space) -> Iterator[Box]:
    if isinstance(space, Box):
        yield space
    elif isinstance(space, Dict | Tuple):
        for part in space.spaces.values() if isinstance(space, Dict) else space.spaces:
            yield from _boxes(part)


def _short(space: Box) -> str:
    return f"Box{space.shape} of {space.dtype}"
