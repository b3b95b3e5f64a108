"""Schedules: what a coefficient is multiplied by as training goes on, by name or by a function of the user's own."""

from __future__ import annotations

import difflib
import math
from functools import cache

from rlhf_ppo.runtime.command_line.user_code import FAILURES, load_function

NAMES = ("constant", "linear", "cosine", "piecewise")
PIECES = "piecewise:0.5=0.1,0.9=0.01"


def factor(schedule: str, done: float) -> float:
    """Return what the coefficient is multiplied by after the share ``done`` (0 to 1) of all steps.

    constant: 1. linear: from 1 to 0. cosine: from 1 to 0 along half a wave. ``piecewise:0.5=0.1,0.9=0.01``: 1, from
    half of the steps on 0.1, from nine tenths on 0.01. ``file.py:function`` or ``module:function``: what it returns.

    Raises:
        ValueError: there is no such schedule or function, or it returned no finite number of 0 or more.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - done
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule.startswith("piecewise:"):
        return next((value for start, value in reversed(_pieces(schedule)) if done >= start), 1.0)
    function = load_function(schedule, "schedule")
    try:
        value = function(done)
    except FAILURES as error:
        raise ValueError(f"schedule {schedule!r} failed at {done:.3g}: {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"schedule {schedule!r} must return a finite number, 0 or more, got {value!r} at {done:.3g}")
    return number


def is_function(schedule: str | None) -> bool:
    """Return whether a schedule names a function, which is the user's code."""
    return schedule is not None and ":" in schedule and not schedule.startswith("piecewise:")


def shares(schedule: str) -> list[float]:
    """Return the shares of all steps at which a schedule is tried out before training."""
    return [start for start, _ in _pieces(schedule)] if schedule.startswith("piecewise:") else [0.0, 0.25, 0.5, 0.75]


def require_schedule(setting: str, schedule: str) -> None:
    """Raise a ValueError, naming the setting, unless a schedule has a known name or names a function."""
    name, colon, _ = schedule.partition(":")
    if name == "piecewise":
        try:
            _pieces(schedule)
        except ValueError as error:
            raise ValueError(f"{setting}={schedule!r}: {error}; write shares and factors as {PIECES}") from None
    elif not colon and name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise ValueError(
            f"{setting} must be constant, linear, cosine, {PIECES}, or a function as file.py:function, got {schedule!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )


@cache
def _pieces(schedule: str) -> list[tuple[float, float]]:
    """Return (share of all steps, factor from there on), in order."""
    pieces = []
    for text in schedule.partition(":")[2].split(","):
        start, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is no share=factor")
        pieces.append((float(start), float(value)))
    starts = [start for start, _ in pieces]
    if (
        starts != sorted(set(starts))
        or not 0 <= starts[0] <= starts[-1] < 1
        or not all(0 <= value < math.inf for _, value in pieces)
    ):
        raise ValueError("shares must rise from 0 to below 1, and factors be 0 or more and finite")
    return pieces
