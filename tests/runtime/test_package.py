"""Old module names: they import the same module with a warning; the new names warn of nothing."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from rlhf_ppo.runtime.package import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_imports_the_module_of_the_new_one_with_a_warning(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    module = importlib.import_module(new)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        assert importlib.import_module(old) is module
    assert module.__spec__.name == module.__name__ == new
    assert importlib.util.find_spec(new) is module.__spec__


def test_a_module_imported_by_its_old_name_can_be_reloaded():
    """In an interpreter of its own: a reload gives the module new classes."""
    code = "import importlib, classic.comparison as m; print(importlib.reload(m).__name__, m.__spec__.name)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["classic.compare", "classic.compare"]
