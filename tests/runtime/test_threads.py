"""Threads: they sleep while they wait, and a run takes no more CPUs than it was given."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

import classic.cli
import rlhf_ppo.cli
from classic.envs.make_env import make_vector_env
from rlhf_ppo.runtime.logs.progress import model_rows
from rlhf_ppo.runtime.machine.threads import choose_threads, usable_cpus

# Stops at the first of torch's own modules (torch itself may only be looked for), and says what OpenMP will read there.
LOOK = """
import importlib.abc, os, sys
class Look(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch."):
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Look())
import """


@pytest.mark.parametrize(
    ("module", "given", "read"),
    [
        ("rlhf_ppo.pipeline.train", None, "PASSIVE"),
        ("classic.commands", None, "PASSIVE"),
        ("classic.ppo", None, "PASSIVE"),
        ("rlhf_ppo.rewards.http_server", None, "PASSIVE"),
        ("rlhf_ppo.pipeline.train", "ACTIVE", "ACTIVE"),
    ],
)
def test_threads_are_told_to_sleep_before_torch_is_loaded(module, given, read):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    done = subprocess.run([sys.executable, "-c", LOOK + module], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == read, done.stderr


@pytest.mark.parametrize(
    ("before", "given", "spin"),
    [("import torch; ", {}, True), ("import torch; ", {"OMP_WAIT_POLICY": "PASSIVE"}, False),
     ("import torch; ", {"GOMP_SPINCOUNT": "0"}, False), ("", {}, False)],
)  # fmt: skip
def test_a_script_that_loads_torch_first_is_told_so(before, given, spin, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("")  # stands for the real one, which takes seconds to load
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    code = f"{before}from rlhf_ppo.runtime.package import THREADS_SPIN; print(THREADS_SPIN)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(spin), done.stderr
    monkeypatch.setattr("rlhf_ppo.runtime.package.THREADS_SPIN", spin)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    row = model_rows("m", nn.Linear(2, 2), device=torch.device("cpu"), bf16=False)["threads"]
    assert ("import rlhf_ppo before torch" in row) == spin


class Says(gymnasium.Env):
    """Its observation is 1 where OpenMP will be told to sleep."""

    observation_space, action_space = Box(0, 1, (1,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.full(1, os.environ.get("OMP_WAIT_POLICY") == "PASSIVE", np.float32), {}


def test_environments_in_processes_of_their_own_are_told_it_too():
    envs = make_vector_env(Says, 2, None, vectorization="async")
    try:
        assert envs.reset()[0].tolist() == [[1.0], [1.0]]
    finally:
        envs.close()


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),  # one and a half: two threads that rest now and then
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_usable_cpus_are_what_affinity_and_container_leave(files, cpus, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path) == cpus


def test_small_models_get_one_thread_and_others_the_cpus_unless_the_user_says(monkeypatch):
    small, large = nn.Linear(10, 10), nn.Linear(4000, 2500, device="meta")
    monkeypatch.setattr("rlhf_ppo.runtime.machine.threads.usable_cpus", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (choose_threads(small), choose_threads(large), choose_threads()) == (1, 3, 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert (choose_threads(small), choose_threads(large)) == (8, 8)


COMPUTING = [
    *(rlhf_ppo.cli.COMMANDS[name][0] for name in ("demo", "train", "sft", "reward", "evaluate", "generate", "replay")),
    *(classic.cli.COMMANDS[name][0] for name in ("train", "evaluate", "compare")),
]


@pytest.mark.parametrize("command", COMPUTING)
def test_every_command_that_computes_takes_num_threads(command):
    assert "num_threads" in {field.name for field in dataclasses.fields(command)}


@pytest.mark.parametrize(
    "flags",
    [
        "demo",
        "train --model m --reward r --dataset d --output-dir o",
        "sft --dataset d --output-dir o --model m",
        "reward --dataset d --output-dir o",
        "evaluate --model m --reward r --dataset d",
        "generate --model m --prompt p",
        "replay folder",
    ],
)
def test_no_threads_at_all_are_refused_before_anything_is_loaded(flags, capsys):
    """Where the settings are read, which ends the program, or by the command."""
    try:
        code = rlhf_ppo.cli.main([*flags.split(), "--num-threads", "0"])
    except SystemExit as end:
        code = end.code
    assert code == 2 and "num_threads must be" in capsys.readouterr().err


def test_classic_evaluation_refuses_it_too(capsys):
    with pytest.raises(SystemExit) as end:
        classic.cli.main(["evaluate", "folder", "--num-threads", "0"])
    assert end.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "num_threads must be 1 or more, or None, got 0" in said


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")
@pytest.mark.parametrize(("given", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_freed_tensors_stay_in_the_process_unless_the_user_sets_the_allocator(given, kept):
    code = """
import resource, rlhf_ppo
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
large = bytearray(2**24)
large[::4096] = b"x" * (2**24 // 4096)
del large
print(resident() - before > 2**23)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(kept), done.stderr
