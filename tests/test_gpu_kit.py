"""The kit for a GPU: its own workings, without one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture
def kit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_kit")


@pytest.fixture
def wheels(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("wheels")


def test_the_kit_runs_without_a_gpu(tmp_path):
    command = ["benchmarks/gpu_kit.sh", "--device", "cpu", "--tiny", "--steps", "ours", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GPU_KIT_SITE": f"{tmp_path}/site"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    machine, measured, step = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert machine["machine"].split(", ")[1].startswith("cpu torch") and machine["tiny"]
    assert measured["side"] == "defaults" and measured["seconds"][0] > 0
    assert step["step"] == "ours" and step["outcome"] == "passed" and 0 < step["seconds"] < step["limit_seconds"]
    table = done.stdout[done.stdout.index("| step |") :]
    assert table.strip() in (tmp_path / "table.md").read_text() and "| | defaults | 0." in table


FAILED = '{"model": "m", "way": "w", "outcome": "failed", "why": "KeyError: 1"}\n'


def test_a_step_that_fails_or_takes_too_long_stops_none(kit, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.jsonl"
    writes = f"open({str(results)!r}, 'a').write("
    long = writes + """'{"run": "a", "text": "kept"}\\n{"run": "cut'); import time; time.sleep(60)"""
    bad = "raise ValueError('no such kernel\\nand more')"
    python = [sys.executable, "-c"]
    steps = [
        kit.Step("long", "", 1, [*python, long]),
        kit.Step("bad", "", 60, [*python, bad]),
        kit.Step("partly", "", 60, [*python, writes + repr(FAILED) + "); raise SystemExit(1)"]),
        kit.Step("absent", "", 60, [*python, "1"], needs="no_such_module"),
        kit.Step("good", "", 60, [*python, writes + """'{"run": "b", "text": "fine"}\\n')"""]),
    ]
    monkeypatch.setattr(kit, "steps", lambda *_, **__: steps)
    monkeypatch.setattr(kit, "machine", lambda device: "a machine")
    (tmp_path / "log.txt").write_text("of an earlier session")
    assert kit.main(["--out", str(tmp_path)]) == 1
    rows = [json.loads(line) for line in results.read_text().splitlines() if "cut" not in line]
    assert [row["outcome"] for row in rows if "step" in row] == [
        "out of time",
        "failed",
        "failed",
        "left out",
        "passed",
    ]
    assert {"run": "a", "text": "kept"} in rows and {"run": "b", "text": "fine"} in rows
    table = capsys.readouterr().out.partition("| step |")[2]
    assert "| bad |  | failed: ValueError: no such kernel |" in table
    assert "| partly |  | failed: w: KeyError: 1 |" in table and "| | m w | failed: KeyError: 1 | |" in table
    assert "| | a | kept | |" in table and "| | b | fine | |" in table
    assert "left out: needs no_such_module, which is not installed" in table
    assert "earlier" not in (tmp_path / "log.txt").read_text()


def test_steps_at_the_end_get_the_time_that_is_left(kit, tmp_path, monkeypatch):
    steps = [kit.Step(name, "", 60, [sys.executable, "-c", "1"]) for name in ("one", "two")]
    assert kit.run_step(steps[0], 30.0, tmp_path)["limit_seconds"] == 30
    row = kit.run_step(steps[1], 3.0, tmp_path)
    assert (row["outcome"], row["why"]) == ("left out", "no time is left")


def test_tests_are_counted_also_when_they_were_cut_off(kit):
    log = """
tests/a.py::test_one[a b] PASSED                                     [ 20%]
tests/a.py::test_two SKIPPED (needs a CUDA GPU)                      [ 40%]
tests/a.py::test_three[all losses] FAILED                            [ 60%]
tests/a.py::test_four
[gw3] [ 80%] PASSED tests/a.py::test_four
"""
    assert kit.read_tests(log)[0]["text"] == "2 passed, 1 failed, 1 skipped"
    log += "FAILED tests/a.py::test_three[all losses] - RuntimeError: a - b\nERROR tests/b.py - ImportError: no\n"
    assert [row["text"] for row in kit.read_tests(log)[1:]] == [
        "tests/a.py::test_three[all losses]: RuntimeError: a - b",
        "tests/b.py: ImportError: no",
    ]
    assert kit.read_tests("")[0]["text"] == "no test ran"


class ParsedError(Exception):
    """Raised in place of what a script would do next."""


def test_every_steps_command_is_one_that_its_script_takes(kit, monkeypatch, tmp_path):
    """Without running any: a wrong flag or name would end with the usage."""
    for tiny, device in ((False, "cuda"), (True, "cpu")):
        for step in kit.steps(device, tiny=tiny, rows=tmp_path / "rows.jsonl"):
            script, *words = step.command[1:]
            if script == "-m":
                continue

            def parse(parser, argv=None, words=words):
                assert parser.parse_known_args(words)[1] == []
                raise ParsedError

            monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse)
            with pytest.raises(ParsedError):
                importlib.import_module(Path(script).stem).main()
            if "--models" in words:
                models = importlib.import_module("gpu").cases(tiny)
                assert words[words.index("--models") + 1] in models


def make_wheel(folder: Path, name: str, version: str, *needs: str, tag: str = "py3-none-any") -> None:
    info = f"{name}-{version}.dist-info"
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n\ntext\n")


def test_what_is_missing_is_installed_with_what_it_needs(wheels, tmp_path, monkeypatch):
    make_wheel(tmp_path, "absent", "1.2", "its_need>1", "torch>=2", 'other; python_version < "3"', 'x; extra == "x"')
    make_wheel(tmp_path, "its_need", "2.0")
    make_wheel(tmp_path, "pytest", "99.0")
    make_wheel(tmp_path, "foreign", "1.0", tag="cp27-cp27m-win32")
    found = wheels.carried(tmp_path)
    for names, files, lacking in (
        (["absent", "pytest"], ["absent-1.2", "its_need-2.0"], []),  # pytest is there and new enough
        (["pytest>=99"], ["pytest-99.0"], []),
        (["absent>=2", "foreign", "torch>=2"], [], ["absent>=2", "foreign"]),
    ):
        monkeypatch.setattr(wheels, "wanted", lambda names=names: list(map(Requirement, names)))
        chosen, unmet = wheels.missing(found)
        assert [file.name.removesuffix("-py3-none-any.whl") for file in chosen] == files and unmet == lacking


def test_what_is_carried_is_what_this_project_needs_here(wheels):
    carried = wheels.to_carry("3.12")
    assert {"peft", "tyro", "pydantic", "pydantic-core", "vadersentiment", "docstring-parser"} <= carried.keys()
    assert carried["trl"] == "1.12.0" and not carried.keys() & wheels.NOT_CARRIED
    assert "tomli" not in carried  # a need of older Pythons
