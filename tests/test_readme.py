"""README and docs hold what they say: links lead somewhere, commands parse, Python blocks run, figures are dated."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ppo.cli import COMMANDS
from rlhf_ppo.runtime.metrics import metrics_page
from rlhf_ppo.runtime.settings import parse_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_of_the_readme_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line.partition("#")[0] for block in blocks("") for line in block.splitlines()]
    found = 0
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for line in [*lines, *re.findall(r"`([^`\n]+)`", prose)]:
        words = shlex.split(line) if line.startswith((".venv/bin/rlhf-ppo", "make ")) else []
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
            found += 1
        elif words:
            parse_settings(COMMANDS[words[1]][0], words[2:], prog="rlhf-ppo")
            found += 1
    assert found >= 5


def test_python_blocks_of_the_readme_run(tmp_path):
    training, cartpole, core = blocks("python")
    prepare = (
        "import torch\nfrom rlhf_ppo.core import PolicyOutput\n"
        "rewards = values = next_values = torch.zeros(2, 3)\n"
        "terminated = truncated = torch.zeros(2, 3, dtype=torch.bool)\nmask = ~terminated\n"
        "logprobs = torch.zeros(2, 3)\nnew = PolicyOutput(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3))\n"
    )
    for code in (training, cartpole.replace("50_000", "2_048"), prepare + core):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_metric_page_is_the_dictionary():
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == metrics_page(), "run `make docs`"


def test_the_map_names_every_module():
    for file in [*(ROOT / "rlhf_ppo").glob("*.py"), *(ROOT / "rlhf_ppo" / "core").glob("*.py")]:
        if file.name != "__init__.py":
            assert file.name in README, f"{file} is missing from the README's map"


def test_each_module_says_in_its_first_line_what_it_is_for():
    for package in ("rlhf_ppo", "classic", "examples", "tests", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            assert file.read_text(encoding="utf-8").startswith('"""'), file


def test_each_yes_of_the_comparison_has_a_test_that_exists():
    """Rows where our column says yes link a test file; rows without one say no in bold."""
    table = README.partition("## How it compares\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line[:2] == "| "]
    ours = [cell.strip() for cell in rows[1:] if cell.strip()]
    assert len(ours) > 30
    for cell in ours:
        linked = [part.split(")")[0] for part in cell.split("](")[1:]]
        assert linked or cell == "**no**", cell
        assert all(name.startswith("tests/") and (ROOT / name).is_file() for name in linked), cell
