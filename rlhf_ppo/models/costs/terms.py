"""Terms: numbers that carry the arithmetic they come from."""

from __future__ import annotations

import math
from typing import NamedTuple

TIMES = "times"
"""Unit of a bare number; once is not worth writing."""


class Term(NamedTuple):
    """One summand of a cost."""

    what: str
    """What costs it."""
    amount: float
    """Bytes or seconds."""
    how: str
    """The arithmetic, as a reader can check it."""


def term(what: str, *factors: tuple[float, str], over: tuple[float, str] | None = None) -> Term:
    """Return a term that is the product of factors, each with its unit, divided by ``over``.

    A unit in brackets stands for its number, such as (3/4).
    """
    how = " x ".join(_written(*factor) for factor in factors if factor != (1, TIMES))
    amount = math.prod(number for number, _ in factors)
    if over is None:
        return Term(what, amount, how)
    return Term(what, amount / over[0], f"{how} / {figure(over[0])} {over[1]}")


def _written(number: float, unit: str) -> str:
    return unit if unit.startswith("(") else f"{figure(number)} {unit}"


def total(terms: list[Term]) -> float:
    """Add terms up."""
    return math.fsum(x.amount for x in terms)


def figure(number: float) -> str:
    """Write a factor: whole numbers in full, others with three digits."""
    return f"{number:,.0f}" if float(number).is_integer() and number < 1e12 else f"{number:.3g}"
