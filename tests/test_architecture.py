"""The direction of imports, what a bare import loads, and what every file says first."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "rlhf_ppo", ROOT / "classic"]
FILES = sorted(file for package in PACKAGES for file in package.rglob("*.py"))
HEAVY = ["transformers", "datasets", "accelerate", "peft"]


def imports(file: Path) -> set[str]:
    """Every module that a file imports, wherever in it, by its full name."""
    found: set[str] = set()
    package = ".".join(file.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            # `from rlhf_ppo import core` imports rlhf_ppo.core.
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def tops(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


def ids(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


CORE = [file for file in FILES if file.is_relative_to(ROOT / "rlhf_ppo/core")]
RUNTIME = [file for file in FILES if file.is_relative_to(ROOT / "rlhf_ppo/runtime")]
CLASSIC = [file for file in FILES if file.is_relative_to(ROOT / "classic")]


def test_the_walk_sees_the_packages():
    assert len(CORE) > 5 and len(RUNTIME) > 5 and len(CLASSIC) >= 1
    assert "rlhf_ppo.core.kl" in imports(ROOT / "rlhf_ppo/core/losses.py")


@pytest.mark.parametrize("file", CORE, ids=ids(CORE))
def test_core_imports_torch_and_the_standard_library_alone(file):
    assert tops(file) <= {"torch", "rlhf_ppo"} | sys.stdlib_module_names
    inner = {name for name in imports(file) if name.startswith("rlhf_ppo")}
    assert all(name == "rlhf_ppo.core" or name.startswith("rlhf_ppo.core.") for name in inner)


@pytest.mark.parametrize("file", RUNTIME, ids=ids(RUNTIME))
def test_runtime_imports_core_and_runtime_alone_of_the_project(file):
    inner = {name for name in imports(file) if name.split(".")[0] in ("rlhf_ppo", "classic")}
    allowed = ("rlhf_ppo.core", "rlhf_ppo.runtime", "rlhf_ppo.__version__")
    assert all(name == "rlhf_ppo" or name.startswith(allowed) for name in inner)
    # Trackers come from accelerate, which is loaded where one is asked for.
    lazy = {"accelerate"} if file.name == "trackers.py" else set()
    assert not tops(file) & {*HEAVY, "gymnasium"} - lazy


@pytest.mark.parametrize("file", CLASSIC, ids=ids(CLASSIC))
def test_classic_imports_core_and_runtime_alone_of_the_rest(file):
    inner = {name for name in imports(file) if name.split(".")[0] == "rlhf_ppo"}
    allowed = ("rlhf_ppo.core", "rlhf_ppo.runtime", "rlhf_ppo.__version__")
    assert all(name == "rlhf_ppo" or name.startswith(allowed) for name in inner)
    assert not tops(file) & set(HEAVY)


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_nothing_imports_examples_tests_or_benchmarks_and_frontends_stay_apart(file):
    assert not tops(file) & {"examples", "tests", "benchmarks", "pytest"}
    if not file.is_relative_to(ROOT / "classic"):
        assert "classic" not in tops(file)


@pytest.mark.parametrize("module", ["rlhf_ppo", "rlhf_ppo.core", "rlhf_ppo.runtime", "classic"])
def test_a_bare_import_loads_nothing_heavy(module):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(answer.stdout.splitlines()[-1]))
    assert module in loaded and not loaded & set(HEAVY)


def test_public_names_are_loaded_when_asked_for():
    code = "import rlhf_ppo; print([getattr(rlhf_ppo, name) for name in rlhf_ppo.__all__] and 'all there')"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "all there"


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_every_file_says_in_its_first_line_what_it_is_for(file):
    sentence = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert sentence and sentence.splitlines()[0].endswith((".", ":"))
