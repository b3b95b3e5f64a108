"""Joining: processes that cannot work together end with one sentence, said by one of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from processes import Ended, ended_processes, in_processes

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.cli import main
from rlhf_ppo.config.arguments.inference import GenerateArgs
from rlhf_ppo.config.arguments.reward_training import RewardTrainingArgs
from rlhf_ppo.config.arguments.sft import SFTArgs
from rlhf_ppo.data.rows import as_rows
from rlhf_ppo.pipeline import generate
from rlhf_ppo.pipeline.labelled import reward_training, sft
from rlhf_ppo.runtime.processes import group, join
from rlhf_ppo.runtime.processes.agreement import require_same
from rlhf_ppo.runtime.processes.errors import OtherProcessError
from rlhf_ppo.runtime.processes.join import join_processes


def join_within_a_second() -> None:
    join_processes(timeout_s=1.0)


def said_once(ended: list[Ended], words: str, code: int) -> None:
    assert [process.code for process in ended] == [code] * len(ended), ended
    assert "".join(process.said for process in ended).count(words) == 1, ended


def test_fault_31_processes_that_never_come_are_named():
    said_once(
        ended_processes(4, join_within_a_second, ranks=[0, 2]), "processes 1, 3 of 4 did not come to 127.0.0.1", 1
    )


def test_fault_31_a_first_process_that_never_comes_is_named():
    said_once(ended_processes(2, join_within_a_second, ranks=[1]), "process 1 of 2 on", 1)


def differences(folder: str) -> list[str]:
    """Return what is said of what differs between the processes."""
    said = []
    rank = int(os.environ["RANK"])
    join.package_versions = lambda: {"torch": f"2.{rank}"}
    with pytest.raises(ValueError) as error:
        join_processes()
    said.append(str(error.value))
    rows = [{"prompt": "a"}, {"prompt": f"b{rank}"}]
    for rate, data in ((1e-3 * (rank + 1), rows[:1]), (1e-3, rows)):
        args = RLHFConfig(output_dir=f"{folder}/run", learning_rate=rate, device="cpu", max_new_tokens=4, quiet=True)
        with pytest.raises(ValueError) as error:
            PPOTrainer(f"{folder}/model", len, args, data)
        said.append(str(error.value))
    with pytest.raises(ValueError) as error:
        require_same(join_processes(), "do it", {"same": [1, 2], "other": {"a": rank}})
    return [*said, str(error.value)]


def test_other_versions_settings_or_data_are_one_sentence_that_names_both(tmp_path, make_model, tokenizer):
    make_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    one, other = in_processes(2, differences, str(tmp_path))
    assert one == other
    versions, settings, data, facts = one
    assert versions == (
        "process 1 of 2 has torch='2.1' where the first one has '2.0': install the same versions everywhere"
    )
    assert settings.startswith("process 1 of 2 has learning_rate=0.002 where the first one has 0.001: start all")
    assert re.match(r"process 1 of 2 has train_dataset='2 rows, \w+' where the first one has '2 rows, \w+': give", data)
    assert facts == "process 1 of 2 has other={'a': 1} where the first one has {'a': 0}: do it"


def differences_of_data(folder: str) -> list[str]:
    """Return what other commands say if a process reads other rows than the first."""
    texts = {"text": "a", "prompt": "a", "chosen": "b", "rejected": f"c{os.environ['RANK']}"}
    model = f"{folder}/model"
    given = {"model": model, "output_dir": f"{folder}/run", "dataset": ("rows",)}
    commands = [
        (sft, "load_data", lambda: sft.sft(SFTArgs(**given))),
        (reward_training, "load_data", lambda: reward_training.train_reward_model(RewardTrainingArgs(**given))),
        (
            generate,
            "load_mixture",
            lambda: generate.generate(GenerateArgs(model=given["model"], dataset="d", output="o")),
        ),
    ]
    said = []
    for module, name, command in commands:
        setattr(module, name, lambda *_, **__: as_rows([texts] * 4))
        with pytest.raises(ValueError) as error:
            command()
        said.append(str(error.value))
    return said


def test_other_commands_compare_their_data_before_models_load(tmp_path, make_model, tokenizer):
    make_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    one, other = in_processes(2, differences_of_data, str(tmp_path))
    assert one == other and len(one) == 3
    for said in one:
        assert re.match(r"process 1 of 2 has dataset='4 rows, \w+' where the first one has '4 rows, \w+': give", said)


def warn() -> None:
    join_processes()
    for _ in range(2):
        warnings.warn("the same on each", stacklevel=1)
    warnings.warn(f"of process {os.environ['RANK']}", stacklevel=1)
    join_processes().facts(os.getpid)  # the first does not end before


def test_a_warning_is_shown_once_and_one_s_own_by_each():
    ended = ended_processes(3, warn)
    said_once(ended, "UserWarning: the same on each", 0)
    assert [f"of process {rank}" in process.said for rank, process in enumerate(ended)] == [True] * 3


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ("train --model m --no-such-flag 1", 2, "no-such-flag"),
        ("train --help", 0, "usage: rlhf-ppo train"),
        ("train --model m --dataset nowhere.jsonl --reward r.py:f --output-dir o", 2, "error: data file nowhere.jsonl"),
        ("trian", 2, "did you mean 'train'"),
    ],
)
def test_usage_and_bad_input_are_printed_once(words, code, line):
    said_once(ended_processes(2, main, words.split()), line, code)


def in_two_places() -> list[str]:
    joined = join_processes()
    place = (lambda: 0) if joined.first else os.getpid
    with pytest.raises(Exception, match="all processes must do the same") as error:
        joined.facts(place)
    assert not isinstance(error.value, OtherProcessError)
    return [str(error.value)]


def test_processes_that_do_different_things_are_told_so():
    one, other = in_processes(2, in_two_places)
    assert one == other
    assert re.match(r"process 0 is in [\w.]*test_joining.in_two_places where process 1 is in posix.getpid", one[0])


def hand_over(done: Path) -> list[str]:
    """Return what each raises if the last process hands an error over: when the other comes, and when it does not."""
    processes, said = join_processes(), []
    for comes in (True, False):
        group.SAVING_S = 20.0 if comes else 0.3
        if not processes.first:
            said.append(str(processes.hand_over(KeyError("mine"))))
        elif comes:
            with pytest.raises(KeyError) as error:
                processes.facts(int)
            said.append(str(error.value))
    if not processes.first:
        done.touch()
    while not done.exists():
        time.sleep(0.01)
    return said


def test_an_error_that_is_handed_over_is_raised_by_all_or_by_its_own_process_alone(tmp_path):
    assert in_processes(2, hand_over, tmp_path / "done") == [["'mine'"], ["'mine'", "'mine'"]]


def launched(parent: str, **variables: str) -> str:
    """What the check says in a process whose parent's command line ends with ``parent``."""
    check = "from rlhf_ppo.runtime.processes.launch import refuse_silent_launcher as check; check()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {json.dumps(check)}])"
    environment = {"PYTHONPATH": ":".join(sys.path), **variables}
    command = [sys.executable, "-c", code, *parent.split()]
    return subprocess.run(command, env=environment, capture_output=True, text=True).stderr


def test_fault_31_accelerate_that_silently_starts_one_process_is_named():
    variables = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    said = launched("launch --cpu --num_processes 2 -m rlhf_ppo", **variables)
    assert "accelerate launch was asked for 2 processes but has started one" in said
    assert "torchrun --nproc-per-node 2 -m rlhf_ppo" in said
    assert "asked for 3 processes" in launched("launch --cpu --num-processes=3 script.py", **variables)
    assert "asked for several processes" in launched("launch --cpu script.py", **variables)
    for fine in (
        launched("launch --cpu --num_processes 1 script.py", **variables),
        launched("launch --cpu --num_processes 2 script.py", **variables, WORLD_SIZE="2"),
        launched("launch --cpu --num_processes 2 script.py", MASTER_ADDR="127.0.0.1"),
    ):
        assert fine == ""
