"""Two machines: a process in each of two network namespaces joined by one link, which is cut, or one of them killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_ppo.runtime.checkpoints.checkpoint import list_checkpoints, verify_checkpoint

REWARD = """
import time

def slow(prompts, completions, **columns):
    time.sleep(0.2)
    return [sum("a" <= x < "n" for x in text) / 7 for text in completions]
"""

TRAIN = "--rollout-batch-size 4 --max-new-tokens 5 --num-epochs 1 --num-minibatches 1".split()
TRAIN += "--save-every 1 --save-total-limit 2 --eval-size 0 --device cpu --precision fp32 --num-threads 1".split()


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


def _can_make_networks() -> bool:
    if sys.platform != "linux" or os.geteuid() or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "rlhf-ppo-probe"], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", "rlhf-ppo-probe"]).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _can_make_networks(), reason="needs root and `ip netns`"),
]


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two namespaces, 10.77.0.1 and 10.77.0.2, each with the one interface `link0` or `link1`."""
    names = [f"rlhf-ppo-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add link0 netns {names[0]} type veth peer name link1 netns {names[1]}")
        for number, name in enumerate(names):
            ip(f"-n {name} addr add 10.77.0.{number + 1}/24 dev link{number}")
            ip(f"-n {name} link set link{number} up")
            ip(f"-n {name} link set lo up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def folder(tmp_path: Path, tokenizer, make_model) -> Path:
    make_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "{text}"}}\n' for text in ("once", "a cat", "blue", "no"))
    )
    (tmp_path / "rewards.py").write_text(REWARD)
    return tmp_path


def start(machines: list[str], folder: Path, rollouts: int = 1000) -> list[subprocess.Popen[bytes]]:
    started = []
    for rank, name in enumerate(machines):
        launch = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
        launch |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29400, "GLOO_SOCKET_IFNAME": f"link{rank}"}
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), **{key: str(x) for key, x in launch.items()}}
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "rlhf_ppo", "train", "--model", "model"]
        command += ["--dataset", "rows.jsonl", "--reward", "rewards.py:slow", "--output-dir", "run", *TRAIN]
        command += ["--total-episodes", str(4 * rollouts), "--resume-from-checkpoint", "auto"]
        with (folder / f"said-{rank}").open("wb") as said:
            started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said))
    return started


def wait_for_checkpoint(folder: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + 120
    while not list_checkpoints(folder / "run"):
        assert time.monotonic() < until and not any(process.poll() for process in processes), said(folder)
        time.sleep(0.1)


def said(folder: Path) -> str:
    return "".join((folder / f"said-{rank}").read_text() for rank in range(2))


def ends(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait(timeout=60) for process in processes]


@pytest.mark.parametrize("victim", [0, 1])
def test_fault_32_a_killed_process_ends_that_of_the_other_machine_and_the_run_goes_on(machines, folder, victim):
    processes = start(machines, folder)
    wait_for_checkpoint(folder, processes)
    processes[victim].send_signal(signal.SIGKILL)
    codes = ends(processes)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, said(folder)
    assert said(folder).count(f"error: process {victim} of 2 (") == 1
    assert not verify_checkpoint(list_checkpoints(folder / "run")[-1])
    done = int(list_checkpoints(folder / "run")[-1].name.rpartition("-")[2])
    assert ends(start(machines, folder, done + 2)) == [0, 0], said(folder)


def test_fault_32_a_cut_link_ends_both(machines, folder):
    processes = start(machines, folder)
    wait_for_checkpoint(folder, processes)
    ip(f"-n {machines[1]} link set link1 down")
    assert ends(processes) == [1, 1], said(folder)
    assert said(folder).count("can no longer be reached: its machine or the network failed") == 2
    assert not verify_checkpoint(list_checkpoints(folder / "run")[-1])
