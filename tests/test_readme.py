"""README and docs hold what they say: links lead somewhere, commands parse, Python blocks run, figures are dated."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import torch

import classic
import rlhf_ppo
from rlhf_ppo import core
from rlhf_ppo.cli import COMMANDS
from rlhf_ppo.runtime.command_line.settings import parse_settings
from rlhf_ppo.runtime.logs.metrics import metrics_page

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_links_lead_somewhere():
    offenders = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
        offenders += [f"{page.name}: {target}" for target in targets if not (page.parent / target).exists()]
    assert not offenders


PATHS = re.compile(
    r"(?<![\w./-])((?:rlhf_ppo|classic|tests|examples|benchmarks|docs)/[\w./-]*\w\.(?:py|md|yaml|json))\b"
)


def test_paths_that_pages_name_exist():
    offenders = []
    for page in PAGES:
        named = set(PATHS.findall(page.read_text(encoding="utf-8")))
        offenders += [f"{page.name}: {name}" for name in named if not (ROOT / name).exists()]
    assert not offenders


def test_modules_that_pages_name_exist():
    """Dotted names under the two packages begin with a module that is there."""
    public = {*rlhf_ppo.__all__, *dir(classic)}
    offenders = []
    for page in PAGES:
        for name in set(re.findall(r"(?<![\w/])((?:rlhf_ppo|classic)\.(?!md\b|py\b)\w+)", page.read_text("utf-8"))):
            module = ROOT.joinpath(*name.split("."))
            known = module.is_dir() or module.with_suffix(".py").is_file() or module.name in public
            offenders += [] if known else [f"{page.name}: {name}"]
    assert not offenders


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


def test_python_blocks_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training, cartpole, own_loop = blocks("python")
    flags = torch.zeros(2, 3, dtype=torch.bool)
    names = dict.fromkeys(("rewards", "values", "next_values", "logprobs"), torch.zeros(2, 3))
    names |= {"terminated": flags, "truncated": flags, "mask": ~flags}
    names["new"] = core.PolicyOutput(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3))
    exec(training.replace("total_episodes=64", "total_episodes=32, max_new_tokens=8"), {})
    exec(cartpole.replace("50_000", "2_048"), {})
    exec(own_loop, names)
    assert (tmp_path / "runs/positive/model.safetensors").is_file() and names["new"].logprobs.grad is not None


def test_metric_page_is_the_dictionary():
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == metrics_page(), "run `make docs`"


def test_the_module_map_is_as_the_modules_say():
    pages = runpy.run_path(str(ROOT / "docs" / "module_map.py"))
    assert pages["PAGE"].read_text(encoding="utf-8") == pages["page"](), "run `make docs`"


def test_the_table_of_equations_names_every_public_function_of_the_core():
    table = README.partition("## Equation, function, test\n")[2].partition("\n## ")[0]
    functions = [name for name in core.__all__ if name.islower()]
    assert len(functions) > 30 and not [name for name in functions if f"`{name}`" not in table]


def test_the_readme_is_short():
    assert len(README.split()) <= 1200


def test_each_script_says_in_its_first_line_what_it_is_for():
    files = [file for part in ("examples", "tests", "benchmarks") for file in (ROOT / part).rglob("*.py")]
    assert not [str(file) for file in files if not file.read_text(encoding="utf-8").startswith('"""')]


def test_each_yes_of_the_comparison_has_a_test_that_exists():
    """Rows where our column says yes link a test file; rows without one say no in bold."""
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2].strip() for line in page.splitlines() if line[:2] == "| "]
    ours = [cell for cell in rows[1:] if cell]
    assert len(ours) > 20
    for cell in ours:
        linked = [part.split(")")[0] for part in cell.split("](")[1:]]
        assert linked or cell == "**no**", cell
        assert all(name.startswith("../tests/") and (ROOT / "docs" / name).is_file() for name in linked), cell
