"""One run per folder: the second is refused, and a killed run holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from rlhf_ppo.runtime.logs.run_directory import RunLockedError, run_lock

HOLD = """
import sys, time
from rlhf_ppo.runtime.logs.run_directory import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_fault_29_a_second_run_is_refused_by_the_pid_of_the_first_until_that_is_killed(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match=rf"in use by another run \(process {first.pid}\)"), run_lock(tmp_path):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with run_lock(tmp_path):
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_one_process_cannot_run_twice_in_a_folder_but_can_run_again(tmp_path):
    for _ in range(2):
        with run_lock(tmp_path), pytest.raises(RunLockedError), run_lock(tmp_path):
            pass


def test_where_locks_do_not_work_a_warning_says_so(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked"), run_lock(tmp_path):
        pass
