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


@pytest.mark.parametrize(
    "name", ["classic.callbacks", "classic.evaluation", "rlhf_ppo.core.losses", "rlhf_ppo.core.kl"]
)
def test_a_module_is_there_without_an_import_of_its_own(name):
    package, module = name.rsplit(".", 1)
    code = f"import {package}; print({name}.__name__); print(hasattr({package}, 'no_{module}'))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [name, "False"]


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("rlhf_ppo.rewards", "RewardError"),
        ("rlhf_ppo.rewards", "RewardModel"),
        ("rlhf_ppo.rewards", "StepRewards"),
        ("rlhf_ppo.reward_calls", "RewardError"),
        ("rlhf_ppo.guard", "PolicyDriftError"),
        ("rlhf_ppo.identity", "SavedModelError"),
        ("rlhf_ppo.conversation", "RespondError"),
        ("rlhf_ppo.trainer", "RatioTripwireError"),
        ("rlhf_ppo.checkpoint", "load_checkpoint"),
        ("rlhf_ppo.runtime.lock", "RunLockedError"),
        ("rlhf_ppo.runtime.machine.threads", "torch_threads"),
        ("classic.making", "BrokenEnvironmentError"),
    ],
)
@pytest.mark.filterwarnings("ignore:.* is now :DeprecationWarning")
def test_a_name_is_found_in_the_module_that_had_it(old, name):
    assert hasattr(importlib.import_module(old), name)
