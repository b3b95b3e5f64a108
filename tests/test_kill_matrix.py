"""A SIGKILL at any file-system step of a run loses nothing: a covering subset here, every step with ``make soak``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent / "soak.py"
FRONTENDS = ("language", "classic")


def soak(*flags: str) -> str:
    # -P: beside the script lies a folder rlhf_ppo, of tests.
    done = subprocess.run([sys.executable, "-P", str(SOAK), *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_fault_21_killed_at_each_kind_of_step_of_a_commit_and_resumed_ends_bit_equal(monkeypatch, frontend):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert "0 lost" in soak("matrix", "--cover", "--rollouts", "2", "--frontend", frontend)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_fault_21_at_every_step(monkeypatch, frontend):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert "0 lost" in soak("matrix", "--frontend", frontend)
