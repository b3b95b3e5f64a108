"""Functions by name: found, shared within a file, and named when they are not there."""

from __future__ import annotations

import pytest

from rlhf_ppo.runtime.command_line.user_code import load_function, load_functions


def test_functions_of_files_and_modules(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("seen = []\ndef add(x):\n    seen.append(x)\ndef look():\n    return seen\n")
    load_function(f"{file}:add", "respond")(3)
    assert load_function(f"{file}:look", "reward")() == [3]
    assert load_function("math:sqrt", "reward")(4) == 2


def test_tools_of_a_file_are_its_own_documented_public_functions(tmp_path):
    file = tmp_path / "tools.py"
    file.write_text(
        "from math import sqrt\nfrom textwrap import dedent\n"
        'def add(): "Add."\ndef sub(): "Subtract."\ndef _hidden(): "Hide."\ndef undocumented(): pass\n'
    )
    assert [f.__name__ for f in load_functions([str(file)], "tools")] == ["add", "sub"]
    assert [f.__name__ for f in load_functions([f"{file}:sub,undocumented", "math:sqrt"], "tools")] == [
        "sub", "undocumented", "sqrt",
    ]  # fmt: skip
    file.write_text("def undocumented(): pass\n")
    with pytest.raises(ValueError, match=r"tools\.py has no public function with a docstring"):
        load_functions([str(file)], "tools")
    with pytest.raises(ValueError, match="tools 'math' names no function"):
        load_functions(["math"], "tools")


def test_a_class_is_instantiated_and_called(make_trainer, tmp_path):
    file = tmp_path / "judges.py"
    file.write_text(
        "class Length:\n"
        "    def __init__(self, factor=2.0):\n"
        "        self.factor = factor\n"
        "    def __call__(self, prompts, completions, **columns):\n"
        "        return [self.factor * len(text) for text in completions]\n"
    )
    trainer = make_trainer(reward_funcs=f"{file}:Length")
    rollout = trainer.rollout(["the cat", "a"])
    assert rollout.scores.tolist() == [2.0 * len(text) for text in rollout.completions]
    with pytest.raises(ValueError, match=r"reward Length is a class: pass one of its instances, Length\(\.\.\.\)"):
        make_trainer(reward_funcs=type(load_function(f"{file}:Length", "reward")))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{folder}/several.py:reply_short", "has no function 'reply_short'; did you mean 'reply_shorter'?"),
        ("{folder}/several.py:something", "has no function 'something'; it has Needy, Silent, reply_shorter"),
        (
            "{folder}/several.py:Needy",
            r"Needy\(\) failed: TypeError: .*'url'.*\(user_code\.py.*instantiated without arguments",
        ),
        ("{folder}/several.py:Silent", "Silent has no __call__"),
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
def test_missing_and_failing_names_are_explained(tmp_path, source, message, monkeypatch):
    (tmp_path / "raises.py").write_text("\n1 / 0\n")
    (tmp_path / "needs.py").write_text("import nowhere_at_all\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "raises_when_imported.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text("def (\n")
    (tmp_path / "several.py").write_text(
        "def reply_shorter(messages): pass\ndef _hidden(): pass\n"
        "class Needy:\n    def __init__(self, url): pass\nclass Silent: pass\n"
    )
    (tmp_path / "mine.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=message):
        load_function(source.format(folder=tmp_path), "respond")
