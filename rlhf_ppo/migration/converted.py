"""What a conversion returns, and the arithmetic that several projects share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_ppo.runtime.logs.trackers import TRACKERS

NO_CLIPPING = 1e9
"""A norm that no gradient reaches."""

SCHEDULES = {"constant": "constant", "linear": "linear", "cosine": "cosine", "constant_with_warmup": "constant"}
"""Learning rate schedule of transformers -> ours."""


@dataclass
class Converted:
    """Settings of `rlhf-ppo train`, and what to say about them."""

    settings: dict[str, Any]
    arithmetic: dict[str, str] = field(default_factory=dict)
    """Setting -> how its number comes about."""
    missing: dict[str, str] = field(default_factory=dict)
    """Setting without a value -> what to fill in."""
    told: list[str] = field(default_factory=list)
    """Arguments that are explained although they have their default."""
    silent: set[str] = field(default_factory=set)
    """Arguments that need no explanation."""
    prompts: list[dict[str, Any]] | None = None
    """Rows of the data set in the form that `train` reads, to be written into a file; None: it reads the data set."""


def in_rollouts(name: str, value: float, rollouts: int | None) -> int:
    """Read a number of rollouts, which may be a share of the run's.

    Raises:
        ValueError: a share of a run whose length is not known.
    """
    if 0 < value < 1 and rollouts is None:
        raise ValueError(
            f"{name}={value} is a share of the run, whose length is not given: add total_episodes, or the number of "
            "rows of the data set (--rows)"
        )
    return int(value) if value >= 1 else math.ceil(value * (rollouts or 0))


def warm_up(theirs: Mapping[str, Any], name: str, rollouts: int | None, converted: Converted) -> None:
    """Set schedule and warm-up: the other projects count it in rollouts, `train` in optimizer steps.

    Args:
        theirs: the project's arguments.
        name: the argument with the warm-up: a number of rollouts or a share of the run's.
        rollouts: of the run; None: not known.
        converted: has the settings of a rollout's optimizer steps.
    Raises:
        ValueError: see :func:`in_rollouts`.
    """
    ours, schedule = converted.settings, theirs["lr_scheduler_type"]
    if schedule in SCHEDULES:
        ours["lr_scheduler_type"] = SCHEDULES[schedule]
    # Their "constant" has no warm-up.
    warmup = 0 if schedule == "constant" else in_rollouts(name, theirs[name] or 0, rollouts)
    steps = ours["num_epochs"] * ours["num_minibatches"]
    ours["warmup_steps"] = warmup * steps
    converted.arithmetic["warmup_steps"] = f"{warmup} rollouts of {steps} steps"


def report_to(trackers: Any, converted: Converted) -> None:
    """Set those of the trackers, a name or a list of names, that are known here."""
    named = trackers if isinstance(trackers, list) else [trackers]
    if known := [name for name in named if name in TRACKERS]:
        converted.settings["report_to"] = known


def require_positive(values: dict[str, Any]) -> None:
    """Raise a ValueError unless all of these sizes are 1 or more."""
    if min(values.values()) < 1:
        listed = [f"{name}={value}" for name, value in values.items()]
        raise ValueError(f"{', '.join(listed[:-1])} and {listed[-1]} must be 1 or more")
