"""Check settings against the environment: refuse what cannot work, warn of what would silently go wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Tuple

from classic.config import CONTINUOUS, PPOArgs
from classic.envs.environments import Environments
from classic.envs.images import unscaled
from classic.envs.masks import unread_masks

REACH = 3.0
"""Standard deviations that a Gaussian policy reaches in practice."""
EXPLORED = 0.5
"""Share of the range between the bounds that it should reach, at least."""
INSIDE = 0.1
"""Share of its draws that should lie between the bounds, at least."""


def require_fit(args: PPOArgs, envs: Environments) -> None:
    """Raise a ValueError unless resolved settings fit the environment's spaces and autoreset mode."""
    _require_full_minibatches(args, next_step_autoreset=envs.next_step_autoreset)
    if args.normalize_observations and len(envs.observation_shape) == 3:
        raise ValueError(
            f"normalize_observations=True, but environment {envs.env_id!r} has images, which are scaled to 0..1 "
            "already: remove it"
        )
    for name, default in CONTINUOUS.items():
        if envs.actions.choices and getattr(args, name) != default:
            raise ValueError(
                f"{name}={getattr(args, name)} is for continuous actions, but environment {envs.env_id!r} has choices: "
                "remove it"
            )


def _require_full_minibatches(args: PPOArgs, *, next_step_autoreset: bool) -> None:
    """Raise a ValueError unless any rollout can fill every minibatch.

    Under NEXT_STEP every second step may be a reset in the worst case, which is episodes of one step.
    """
    assert args.num_envs and args.num_steps and args.num_minibatches
    if args.recurrent != "none":  # whole sequences, of which there are always num_envs
        if next_step_autoreset and args.num_steps < 2:
            raise ValueError(
                f"num_steps={args.num_steps} may hold no decision at all with recurrent={args.recurrent!r} "
                "(NEXT_STEP autoreset may spend it): raise num_steps to 2 or more"
            )
        return
    decisions = args.num_envs * (args.num_steps // 2 if next_step_autoreset else args.num_steps)
    if args.num_minibatches > decisions:
        raise ValueError(
            f"num_minibatches={args.num_minibatches} needs as many decisions, but num_envs={args.num_envs} x "
            f"num_steps={args.num_steps} guarantees only {decisions} (NEXT_STEP autoreset may spend every second "
            "step): lower num_minibatches or raise num_steps"
        )


def warn_before_training(envs: Environments, args: PPOArgs) -> None:
    """Warn of masks that are not read, unscaled observations, unbounded or unexplored actions, and the like."""
    for words in _findings(envs, args):
        warnings.warn(f"environment {envs.env_id!r}: {words}", stacklevel=4)


def _findings(envs: Environments, args: PPOArgs) -> Iterator[str]:
    if names := envs.own_statistics():
        yield (
            f"each copy has statistics of its own in {' and '.join(names)}: they are not saved, start afresh in "
            "evaluations and loaded agents, and returns may be reported scaled. Use normalize_observations=True and "
            "normalize_rewards=True instead, whose statistics belong to the agent"
        )
    if envs.actions.choices and args.action_masks is not False:
        for name in unread_masks(envs.observation_space, envs.actions):
            yield (
                f"the part {name!r} of its observations looks like a mask of actions, but is read as numbers: give "
                f"infos['action_mask'], a method action_masks(), or a part 'action_mask' of {envs.actions.num_outputs} "
                "zeros and ones; action_masks=False if it is not one"
            )
    if not args.normalize_observations:
        for part in _boxes(envs.observation_space):
            if (why := unscaled(part)) is not None:
                yield f"its observations {_short(part)} {why}"
    space = envs.action_space
    if isinstance(space, Box) and not args.squash and (why := unexplored(space, args.log_std_init or 0.0)) is not None:
        yield f"its actions {_short(space)} {why}"


def unexplored(space: Box, log_std: float) -> str | None:
    """Explain why a Gaussian policy that starts around 0 cannot reach all actions in these bounds; None: it can."""
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
