"""Dependencies: floors below which there are known holes, and versions pinned above them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FLOORS = {"torch": (2, 10), "transformers": (5, 5)}
"""Older ones run code that is hidden in a model's files, or let a config turn trust_remote_code on."""


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def floors(requirements: list[str]) -> dict[str, tuple[int, ...]]:
    found = (re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?", line) for line in requirements)
    return {match[1].lower(): version(match[2] or "0") for match in found if match}


def pins() -> dict[str, tuple[int, ...]]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name.lower(): version(text) for name, _, text in (line.partition("==") for line in lines) if text}


@pytest.mark.parametrize("name", FLOORS)
def test_floors_are_not_below_the_safe_ones(name):
    assert floors(PROJECT["dependencies"])[name] >= FLOORS[name]


def test_python_is_new_enough_for_them():
    assert version(PROJECT["requires-python"]) >= (3, 11)


def test_every_dependency_has_a_floor_and_a_pin_that_satisfies_it():
    wanted = floors([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    assert len(wanted) == len(PROJECT["dependencies"]) + len(PROJECT["optional-dependencies"]["dev"])
    for name, floor in wanted.items():
        assert floor > (0,) and pins()[name] >= floor, name
