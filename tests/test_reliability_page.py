"""The reliability page: 35 faults, and each test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
ROWS = {
    int(n): line for line in PAGE.splitlines() if (n := line.split("|")[1].strip() if "|" in line else "").isdigit()
}
LINKS = re.findall(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", PAGE)
NOT_YET = {32}
"""Faults that cannot happen yet; the page says why."""


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_a_row_and_every_row_a_test():
    assert list(ROWS) == list(range(1, 36))
    assert {n for n, line in ROWS.items() if "](../tests/" not in line} == NOT_YET
    assert len(LINKS) > 90


@pytest.mark.parametrize(("name", "file"), LINKS, ids=[name for name, _ in LINKS])
def test_each_test_that_the_page_names_is_there(name, file):
    assert name in names_in(file)
