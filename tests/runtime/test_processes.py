"""Processes: a launcher that announces several is refused by every command and class before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import classic
import classic.cli
from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.cli import main
from rlhf_ppo.runtime.processes.group import Part, ProcessGroup
from rlhf_ppo.runtime.processes.launch import Launch, read_launch, require_one_process


@pytest.mark.parametrize("alone", [None, "1", " 1 "])
def test_one_process_is_fine(monkeypatch, alone):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if alone is not None:
        monkeypatch.setenv("WORLD_SIZE", alone)
    require_one_process("classic", "it is small")
    assert read_launch() == Launch(0, 1, 0, 1)


@pytest.mark.parametrize("size", ["0", "two", ""])
def test_fault_31_no_number_of_processes_is_refused_with_its_value(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match=f"WORLD_SIZE='{size}'.*unset it"):
        read_launch()
    with pytest.raises(ValueError, match=f"WORLD_SIZE='{size}'.*unset it"):
        require_one_process("classic", "it is small")


def test_the_launcher_says_which_process_this_is(monkeypatch):
    said = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "a", "MASTER_PORT": 1}
    for name, value in said.items():
        monkeypatch.setenv(name, str(value))
    assert read_launch() == Launch(rank=5, size=8, local_rank=1, local_size=4)


def test_fault_31_a_number_of_processes_without_the_others_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2.*RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"):
        PPOTrainer("nobody/nothing", len, RLHFConfig(output_dir=str(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2.*classic runs in one: its networks"):
        classic.PPO("Nothing-v0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command",
    [
        "train --model nobody/nothing --reward no.py:f --dataset rows.jsonl --output-dir out --eval-size 0",
        "sft --model nobody/nothing --dataset rows.jsonl --output-dir out",
        "reward --model nobody/nothing --dataset rows.jsonl --output-dir out",
        "generate --model nobody/nothing --prompt x",
        "evaluate --model embedded --ref-model embedded --dataset rows.jsonl --reward no.py:f --output-dir out",
    ],
)
def test_fault_31_every_command_refuses(monkeypatch, tmp_path, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assert main(command.split()) == 2
    assert "error: WORLD_SIZE=2" in capsys.readouterr().err


def test_fault_31_classic_refuses_too(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert classic.cli.main(["train", "CartPole-v1"]) == 2
    assert "error: WORLD_SIZE=2" in capsys.readouterr().err


def test_fault_31_a_launched_process_ends_with_one_line(tmp_path):
    """As torchrun would start it: the real command, with its variables set."""
    command = [sys.executable, "-m", "classic.cli", "train", "CartPole-v1"]
    environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: WORLD_SIZE=2") and done.stderr.count("\n") == 1


def test_fault_32_under_a_launcher_all_processes_end_and_nothing_is_written(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "classic.cli", "train", "CartPole-v1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("error: WORLD_SIZE=2") == 1
    assert not any(tmp_path.iterdir())


def test_facts_that_json_cannot_hold_are_an_error_that_the_others_hear_of(monkeypatch):
    group, sent = ProcessGroup(rank=0, size=2), []

    def gather(tensors, message, waiting):
        sent.append(json.loads(message))
        return [Part({}, sent[0])] * 2

    monkeypatch.setattr(group, "_gather", gather)
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        group.facts(object)
    assert sent[0]["facts"] is None and "object is not JSON serializable" in str(sent[0]["error"])
    sent.clear()
    assert group.facts(lambda: ["a", 1]) == [["a", 1]] * 2
