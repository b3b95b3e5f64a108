"""Pages that lead to tests: the faults of the reliability page, and PPO topic by topic; each test is there."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
ROWS = {
    int(n): line for line in PAGE.splitlines() if (n := line.split("|")[1].strip() if "|" in line else "").isdigit()
}
KINDS = re.findall(r"^\| ([A-J])\d+ \|.*$", PAGE, re.MULTILINE)
"""The letters of the faults of models, tokenizers and machines, one a row."""
TOPICS = (ROOT / "docs/learning-ppo.md").read_text(encoding="utf-8")
LINKS = sorted(set(re.findall(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", PAGE + TOPICS)))


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_a_row_and_every_row_a_test():
    assert list(ROWS) == list(range(1, 36))
    assert all("](../tests/" in line for line in ROWS.values())
    assert PAGE.count("](../tests/") > 90


def test_every_kind_of_fault_of_models_tokenizers_and_machines_has_rows_with_tests():
    assert sorted(set(KINDS)) == list("ABCDEFGHIJ") and all(a <= b for a, b in pairwise(KINDS))
    rows = [line for line in PAGE.splitlines() if re.match(r"\| [A-J]\d+ \|", line)]
    assert len(rows) == len(KINDS) and all("](../tests/" in row for row in rows)


def test_every_topic_and_every_mistake_has_a_test():
    rows = [
        line for line in TOPICS.splitlines() if line.startswith("| ") and not line.startswith(("| topic", "| mistake"))
    ]
    assert len(rows) > 35 and all("](../tests/" in row for row in rows)


def test_each_test_that_a_page_names_is_there():
    known = {file: names_in(file) for _, file in LINKS if (ROOT / file).is_file()}
    assert len(LINKS) > 250
    assert not [f"{file}::{name}" for name, file in LINKS if name not in known.get(file, ())]
