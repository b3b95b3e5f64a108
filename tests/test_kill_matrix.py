"""A SIGKILL at any file-system step of a run loses nothing: a covering subset here, every step with ``make soak``."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent / "soak.py"
FRONTENDS = ("language", "classic")


def soak(*flags: str) -> str:
    """Run the soak in a forked process, so that its audit hook stays there; returns what it prints."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w")
        sys.argv = [str(SOAK), *flags]
        code = 1
        try:
            code = runpy.run_path(str(SOAK))["main"]()
            sys.stdout.flush()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as output:
        said = output.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    return said


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_fault_21_killed_at_each_kind_of_step_of_a_commit_and_resumed_ends_bit_equal(monkeypatch, frontend):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert "0 lost" in soak("matrix", "--steps", "cover", "--rollouts", "2", "--frontend", frontend)


TWO = "--rollouts 2 --processes 2".split()


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")
@pytest.mark.parametrize(("sharding", "kills"), [("none", 2), ("full", 3)])
def test_fault_21_either_of_two_processes_killed_at_the_commit(monkeypatch, sharding, kills):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    # Before the folder gets its name; and once the second process has written its share.
    said = soak("matrix", *TWO, "--sharding", sharding, "--at", "os.rename .tmp-2|fsync .tmp-2/optimizer.1")
    assert f"{kills} kills" in said and "0 lost" in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")
@pytest.mark.parametrize(("sharding", "steps"), [("none", "cover"), ("full", "commit")])
def test_fault_21_either_of_two_processes_killed_at_the_steps_of_a_commit(monkeypatch, sharding, steps):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert "0 lost" in soak("matrix", *TWO, "--steps", steps, "--sharding", sharding)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_fault_21_at_every_step(monkeypatch, frontend):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert "0 lost" in soak("matrix", "--frontend", frontend)
