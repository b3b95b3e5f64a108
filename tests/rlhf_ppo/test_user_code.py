"""Functions by name: found, shared within a file, and named when they are not there."""

from __future__ import annotations

import pytest

from rlhf_ppo.user_code import load_function


def test_functions_of_files_and_modules(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("seen = []\ndef add(x):\n    seen.append(x)\ndef look():\n    return seen\n")
    load_function(f"{file}:add", "respond")(3)
    assert load_function(f"{file}:look", "reward")() == [3]
    assert load_function("math:sqrt", "reward")(4) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reply", "respond 'reply' names no function"),
        ("{folder}/nowhere.py:reply", r"respond file .*nowhere\.py does not exist"),
        ("{folder}/broken.py:reply", r"broken\.py: .* \(broken\.py, line 1\)"),
        ("{folder}/mine.py:gone", "no function 'gone'"),
        ("no_such_module:reply", "respond module 'no_such_module' cannot be imported: ModuleNotFoundError"),
        ("{folder}/raises.py:reply", r"raises\.py: ZeroDivisionError: division by zero \(raises\.py, line 2\)"),
        (
            "{folder}/needs.py:reply",
            r"needs\.py: ModuleNotFoundError: No module named 'nowhere_at_all' \(needs\.py, line 1",
        ),
        ("{folder}/leaves.py:reply", r"leaves\.py: SystemExit: 0 \(leaves\.py, line 1\)"),
        (
            "raises_when_imported:reply",
            r"cannot be imported: ZeroDivisionError: .*\(raises_when_imported\.py, line 1\)",
        ),
    ],
)
def test_what_is_not_there_or_fails_is_named(tmp_path, source, message, monkeypatch):
    (tmp_path / "raises.py").write_text("\n1 / 0\n")
    (tmp_path / "needs.py").write_text("import nowhere_at_all\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "raises_when_imported.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text("def (\n")
    (tmp_path / "mine.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=message):
        load_function(source.format(folder=tmp_path), "respond")
