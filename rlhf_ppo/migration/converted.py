"""What a conversion returns, and the arithmetic that several projects share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

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


def require_positive(values: dict[str, Any]) -> None:
    """Raise a ValueError unless all of these sizes are 1 or more."""
    if min(values.values()) < 1:
        listed = [f"{name}={value}" for name, value in values.items()]
        raise ValueError(f"{', '.join(listed[:-1])} and {listed[-1]} must be 1 or more")
