"""The direction of imports, what a bare import loads, and what every file says first."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import classic
import rlhf_ppo
import rlhf_ppo.core
from rlhf_ppo.runtime.package import MOVED

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


def module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(file): file for file in FILES}
GRAPH = {name: {target for target in imports(file) if target in MODULES} - {name} for name, file in MODULES.items()}
"""Module -> the project's modules that it imports, for types alone included."""

LEVELS = [
    ["core"],
    ["runtime"],
    ["config"],
    ["data"],
    ["models"],
    ["generation", "rewards"],
    ["training"],
    ["trainer"],
    ["pipeline", "migration"],
    ["verify"],
    ["cli"],
    ["__main__"],
    ["settings_page"],
]
"""Packages and modules of rlhf_ppo: each may import those of lower levels, and none beside it."""

CLASSIC_LEVELS = [["schedules"], ["config"], ["envs"], ["networks", "presets"], ["gradient_step"], ["fast"]]
"""Likewise in classic; modules that are not listed stand above them all."""


def package(name: str) -> str:
    """The part of its frontend that a module belongs to; "" for the root itself."""
    return (name + ".").split(".")[1]


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The groups of modules that import each other, directly or round about."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            for target in graph[waiting.pop()] - found:
                found.add(target)
                waiting.append(target)
        return found

    reach = {name: reachable(name) for name in graph}
    groups = [{other for other in reach[name] if name in reach[other]} for name in graph if name in reach[name]]
    return [group for i, group in enumerate(groups) if group not in groups[:i]]


def test_the_walk_sees_the_packages():
    assert len(FILES) > 100 and {"rlhf_ppo.trainer", "classic.ppo"} <= MODULES.keys()
    assert "rlhf_ppo.core.kl" in GRAPH["rlhf_ppo.core.policy_losses"]


def test_every_part_of_rlhf_ppo_has_a_level():
    assert {package(name) for name in MODULES if name.startswith("rlhf_ppo.")} == {x for level in LEVELS for x in level}


def upward(frontend: str, levels: list[list[str]]) -> list[str]:
    """The imports within a frontend from a listed package of one that is not below it."""
    place = {part: i for i, level in enumerate(levels) for part in level}
    return [
        f"{name} -> {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if name.startswith(f"{frontend}.") and package(name) in place and package(target) != package(name)
        if target.split(".")[0] == frontend and place.get(package(target), len(levels)) >= place[package(name)]
    ]


def test_each_package_imports_only_those_below_it():
    assert not upward("rlhf_ppo", LEVELS)
    assert not [name for name in MODULES if name.startswith("rlhf_ppo.") and "classic" in tops(MODULES[name])]


def test_each_package_of_classic_imports_only_those_below_it():
    assert not upward("classic", CLASSIC_LEVELS)
    known = {package(name) for name in MODULES if name.startswith("classic.")}
    assert {part for level in CLASSIC_LEVELS for part in level} <= known


def test_an_upward_import_is_seen(monkeypatch):
    for name, target in (("rlhf_ppo.core.kl", "rlhf_ppo.trainer"), ("rlhf_ppo.rewards.cache", "rlhf_ppo")):
        monkeypatch.setitem(GRAPH, name, {target})
    monkeypatch.setitem(GRAPH, "classic.envs.masks", {"classic.ppo"})
    assert upward("rlhf_ppo", LEVELS) == ["rlhf_ppo.core.kl -> rlhf_ppo.trainer", "rlhf_ppo.rewards.cache -> rlhf_ppo"]
    assert upward("classic", CLASSIC_LEVELS) == ["classic.envs.masks -> classic.ppo"]


def test_classic_imports_core_and_runtime_alone_of_the_rest():
    offenders = [
        f"{name} -> {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if name.startswith("classic") and target.startswith("rlhf_ppo.") and package(target) not in ("core", "runtime")
    ]
    assert not offenders


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [{"b", "c"}, {"d"}]


def test_no_module_imports_itself_round_about():
    # The package's own __init__ names its public classes for type checkers; nothing imports it.
    assert not circles({name: targets - {"rlhf_ppo"} for name, targets in GRAPH.items()})


def test_no_module_imports_another_by_an_old_name():
    assert not [f"{name}: {old}" for name, file in MODULES.items() for old in imports(file) & MOVED.keys()]


def test_core_imports_torch_and_the_standard_library_alone():
    core = [file for name, file in MODULES.items() if package(name) == "core"]
    assert not [file.name for file in core if tops(file) - {"torch", "rlhf_ppo"} - sys.stdlib_module_names]


def test_nothing_below_the_frontends_imports_their_libraries():
    # Trackers come from accelerate, which is loaded where one is asked for.
    offenders = [
        f"{name}: {found}"
        for name, file in MODULES.items()
        if name.startswith("classic") or package(name) in ("core", "runtime", "config")
        if (found := tops(file) & {*HEAVY, *(() if name.startswith("classic") else ("gymnasium",))})
        if not (name == "rlhf_ppo.runtime.logs.trackers" and found == {"accelerate"})
    ]
    assert not offenders


def test_nothing_imports_examples_tests_or_benchmarks():
    assert not [name for name, file in MODULES.items() if tops(file) & {"examples", "tests", "benchmarks", "pytest"}]


def test_every_file_says_in_its_first_line_what_it_is_for():
    first = {name: (ast.get_docstring(ast.parse(f.read_text(encoding="utf-8"))) or "-") for name, f in MODULES.items()}
    assert not [name for name, text in first.items() if not text.splitlines()[0].endswith((".", ":"))]


LONG_FILE, LONG_FUNCTION = 300, 60
LONG_FILES = ["classic.ppo"]
"""Files that are longer, and say why in their docstring."""


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    doc = node.body[0] if ast.get_docstring(node) else None
    return (node.end_lineno or 0) - node.lineno + 1 - ((doc.end_lineno or 0) - doc.lineno + 1 if doc else 0)


def test_files_and_functions_are_short():
    files = [name for name, file in MODULES.items() if len(file.read_text("utf-8").splitlines()) > LONG_FILE]
    reasons = [ast.get_docstring(ast.parse(MODULES[name].read_text("utf-8"))) or "" for name in LONG_FILES]
    functions = [
        f"{name}.{node.name}"
        for name, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and length(node) > LONG_FUNCTION
    ]
    assert not functions
    assert sorted(files) == LONG_FILES and all("Longer than other files" in reason for reason in reasons)


def test_a_bare_import_loads_nothing_heavy():
    modules = ["rlhf_ppo", "rlhf_ppo.core", "rlhf_ppo.runtime", "classic", "classic.cli", "classic.commands"]
    code = f"import json, sys, {', '.join(modules)}; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(answer.stdout.splitlines()[-1]))
    assert loaded >= set(modules) and not loaded & set(HEAVY)


def test_public_names_are_loaded_when_asked_for():
    for package in (rlhf_ppo, rlhf_ppo.core, classic):
        assert all(getattr(package, name) is not None for name in package.__all__)
