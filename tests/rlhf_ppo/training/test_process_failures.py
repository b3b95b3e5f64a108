"""One of several processes fails, is killed or hangs: all end within seconds, by the first cause.

Each case trains by the real command, with a fault in one process in the second of three iterations; then the run is
resumed from what was saved, and must end as the run without a fault did.
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from float64_runs import make_trainer
from processes import ended_processes, in_processes

import rlhf_ppo.runtime.checkpoints.checkpoint_commit
import rlhf_ppo.trainer
import rlhf_ppo.training.rollouts.generate
import rlhf_ppo.training.run
import rlhf_ppo.training.update
from rlhf_ppo.cli import main
from rlhf_ppo.runtime.checkpoints.checkpoint import list_checkpoints, verify_checkpoint
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.processes.join import join_processes
from rlhf_ppo.training.checkpoints.fingerprints import parameters_fingerprint
from rlhf_ppo.training.checkpoints.resume import SafePoint

REWARD = """
import os
calls = []

def early_letters(prompts, completions, **columns):
    calls.append(1)
    if len(calls) == 2 and os.environ.get("FAILS") == os.environ.get("RANK"):
        raise KeyError("no score")
    return [sum("a" <= x < "n" for x in text) / 7 + len(text) / 71 for text in completions]
"""

EACH_RUN = "--total-episodes 24 --rollout-batch-size 8 --max-new-tokens 5 --num-epochs 1 --num-minibatches 2".split()
EACH_RUN += "--learning-rate 1e-3 --eval-size 0 --device cpu --precision fp32 --num-threads 1".split()


def train(folder: str, output: str, *more: str) -> int:
    """Run the command that all cases run."""
    rlhf_ppo.trainer.plot_run = lambda *_: None  # takes longer than the run
    more = more if "--save-every" in more else (*more, "--save-every", "1")
    given = f"--model {folder}/model --dataset {folder}/rows.jsonl --reward {folder}/rewards.py:early_letters".split()
    return main(["train", *given, "--output-dir", f"{folder}/{output}", *EACH_RUN, *more])


def before(place: Any, name: str, call: int, what: Callable[[], object]) -> None:
    """Do something before a function's ``call``th call."""
    function, calls = getattr(place, name), []

    def changed(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            what()
        return function(*args, **keywords)

    setattr(place, name, changed)


def raising(error: BaseException) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_failure() -> None:
    while not join_processes().broken:
        time.sleep(0.01)


def signalled(number: int) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), number)


sampling, update = rlhf_ppo.training.rollouts.generate, rlhf_ppo.training.update


def in_backward(what: Callable[[], object]) -> tuple[Any, str, int, Callable[[], object]]:
    """In the first backward pass of the second iteration."""
    return update, "clip_and_step", 2, lambda: before(torch.Tensor, "backward", 1, what)


FAULTS: dict[str, tuple[Any, str, int, Callable[[], object]]] = {
    "sampling": (sampling, "_respond_to", 2, raising(RuntimeError("no tokens"))),
    "backward": in_backward(raising(torch.OutOfMemoryError("no memory"))),
    "reference": (rlhf_ppo.training.rollouts.collect, "_read_pass", 2, raising(torch.OutOfMemoryError("no memory"))),
    "logging": (rlhf_ppo.trainer, "log_update", 2, raising(RuntimeError("no log"))),
    "save": (rlhf_ppo.runtime.checkpoints.checkpoint_commit, "_write_tensors", 2, raising(OSError(28, "no space"))),
    "killed in an update": in_backward(kill),
    "killed before a save": (SafePoint, "mark", 6, kill),
    "killed while sampling": (sampling, "_respond_to", 2, kill),
    "exits": in_backward(lambda: os._exit(0)),
    "leaves": in_backward(lambda: sys.exit(7)),
    "hangs": (update, "clip_and_step", 3, lambda: time.sleep(1000)),
    "SIGTERM": (update, "clip_and_step", 3, signalled(signal.SIGTERM)),
    "Ctrl-C": (update, "clip_and_step", 3, signalled(signal.SIGINT)),
    "two Ctrl-C": (update, "clip_and_step", 3, lambda: [signalled(signal.SIGINT)() for _ in range(2)]),
}
"""Name -> before which call of which function what happens."""


OTHERS: dict[str, tuple[Any, str, int, Callable[[], object]]] = {
    "killed before a save": (SafePoint, "mark", 6, wait_for_failure),
    "hangs": (update, "clip_and_step", 3, lambda: join_processes().set_timeout(3)),  # now that all are at work
}
"""What the other processes do meanwhile."""


def train_with(folder: str, fault: str, rank: int, *more: str) -> int:
    """Train with a fault in process ``rank``."""
    if fault == "reward":
        os.environ["FAILS"] = str(rank)
    elif int(os.environ["RANK"]) == rank:
        before(*FAULTS[fault])
    elif fault in OTHERS:
        before(*OTHERS[fault])
    return train(folder, "run", *more)


class Case(NamedTuple):
    fault: str
    rank: int
    code: int
    """Exit code of the processes that are alive to give one."""
    says: str
    """On standard error, once."""
    saved: int = 1
    """The newest checkpoint."""
    own_code: int | None = None
    """Exit code of the process with the fault; None: as all."""
    more: tuple[str, ...] = ()


KILLED = "error: process {rank} of {size} ({name}) ended without a word: it was killed"
CASES = [
    Case("backward", 1, 1, "OutOfMemoryError: no memory"),
    Case("killed while sampling", 1, 1, KILLED, own_code=-9),
    Case("hangs", 1, 1, "test_process_failures.py:"),
    Case("SIGTERM", 1, 143, "stopped by SIGTERM; saved in", saved=2),
    Case("reward", 1, 1, "raised KeyError: 'no score'. The responses are in"),
    Case("reward", 0, 1, "raised KeyError: 'no score'. The responses are in"),
    Case("sampling", 1, 1, "RuntimeError: no tokens"),
    Case("sampling", 0, 1, "RuntimeError: no tokens"),
    Case("backward", 0, 1, "OutOfMemoryError: no memory"),
    Case("save", 1, 1, "no space"),
    Case("save", 0, 1, "no space"),
    Case("killed in an update", 1, 1, KILLED, own_code=-9),
    Case("killed in an update", 0, 1, KILLED, own_code=-9),
    Case("killed while sampling", 0, 1, KILLED, own_code=-9),
    Case("killed before a save", 1, 1, KILLED, saved=2, own_code=-9),
    Case("exits", 1, 1, KILLED, own_code=0),
    Case("leaves", 1, 7, "error: process 1 of {size} failed: SystemExit: 7", own_code=7),
    Case("hangs", 0, 1, "test_process_failures.py:"),
    Case("SIGTERM", 0, 143, "stopped by SIGTERM; saved in", saved=2),
    Case("Ctrl-C", 1, 130, "stopped by SIGINT; saved in", saved=2),
    Case("two Ctrl-C", 1, 130, "interrupted"),
    Case("two Ctrl-C", 0, 130, "interrupted"),
]
FAST = 4
"""So many of these are not slow."""


@pytest.fixture
def folder(tmp_path: Path, tokenizer, make_model) -> Path:
    """A folder with model, data and reward."""
    make_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = ["once upon", "the cat", "a", "dog and cow", "she said", "blue", "no"]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in rows))
    (tmp_path / "rewards.py").write_text(REWARD)
    return tmp_path


def end_of(run: Path) -> tuple[list[dict[str, float]], bytes, bytes]:
    """What a run left: its metrics and weights."""
    weights = [(run / name).read_bytes() for name in ("model.safetensors", "value_head.safetensors")]
    return RunDirectory(run).read(), *weights


_whole: dict[tuple[object, ...], Any] = {}


def run_without_fault(folder: Path, count: int, *more: str) -> tuple[list[dict[str, float]], bytes, bytes]:
    if (count, *more) not in _whole:
        ended = ended_processes(count, train, str(folder), "whole", *more)
        assert [process.code for process in ended] == [0] * count, ended[0].said
        _whole[count, *more] = end_of(folder / "whole")
    return _whole[count, *more]


def require_goes_on(folder: Path, count: int, *more: str) -> None:
    """Resume the run, and require that it ends as the one without a fault."""
    resumed = ended_processes(count, train, str(folder), "run", *more, "--resume-from-checkpoint", "auto")
    assert [process.code for process in resumed] == [0] * count, resumed[0].said
    assert end_of(folder / "run") == run_without_fault(folder, count, *more)


def require_ended(folder: Path, case: Case, count: int, *more: str) -> None:
    """Train with a fault, and require that all processes have ended as the case says."""
    ended = ended_processes(count, train_with, str(folder), case.fault, case.rank, *case.more, *more)
    said = "".join(process.said for process in ended)
    codes = [case.code] * count
    codes[case.rank] = case.code if case.own_code is None else case.own_code
    assert [process.code for process in ended] == codes, said
    assert max(process.seconds for process in ended) < 60, "much later than the first"
    says = re.escape(case.says).replace(r"\{rank\}", str(case.rank)).replace(r"\{size\}", str(count))
    assert len(re.findall(says.replace(r"\{name\}", r"[\w, ]+"), said)) == 1, said
    assert said.count("Traceback") <= 1 and said.count("error: ") <= 1
    checkpoints = list_checkpoints(folder / "run")
    assert not any(verify_checkpoint(checkpoint) for checkpoint in checkpoints)
    assert [checkpoint.name for checkpoint in checkpoints[-1:]] == [f"checkpoint-{case.saved}"] * (case.saved > 0)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case.fault} {case.rank}", marks=() if i < FAST else pytest.mark.slow)
        for i, case in enumerate(CASES)
    ],
)
def test_fault_32_all_end_by_the_first_cause_and_the_run_goes_on(folder, case: Case, count):
    require_ended(folder, case, count)
    if case not in CASES[1:FAST] or case.own_code is not None:  # to save time
        require_goes_on(folder, count)


SHARDED = "--sharding full --save-every 2".split()
LAYERS = ("--sharded-decoding", "layers")
SHARDED_CASES = [
    Case("logging", 1, 1, "RuntimeError: no log", saved=2),
    Case("sampling", 1, 1, "RuntimeError: no tokens", more=LAYERS),
    Case("killed before a save", 1, 1, KILLED, saved=0, own_code=-9),
    Case("reward", 1, 1, "raised KeyError: 'no score'. The responses are in"),
    Case("reward", 0, 1, "raised KeyError: 'no score'. The responses are in"),
    Case("sampling", 0, 1, "RuntimeError: no tokens", more=LAYERS),
    Case("sampling", 1, 1, "RuntimeError: no tokens"),
    Case("reference", 1, 1, "OutOfMemoryError: no memory", saved=0),
    Case("backward", 1, 1, "OutOfMemoryError: no memory", saved=0),
    Case("save", 1, 1, "no space", saved=2),
    Case("killed in an update", 1, 1, KILLED, saved=0, own_code=-9),
    Case("killed while sampling", 0, 1, KILLED, saved=0, own_code=-9),
    Case("hangs", 1, 1, "test_process_failures.py:", saved=0),
    Case("SIGTERM", 1, 143, "stopped by SIGTERM; saved in", saved=2),
]
FAST_SHARDED = 3
"""Under sharding, with a checkpoint every two iterations; ``saved`` by processes that can still meet."""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=" ".join([case.fault, str(case.rank), *case.more[1:]]),
            marks=() if i < FAST_SHARDED else pytest.mark.slow,
        )
        for i, case in enumerate(SHARDED_CASES)
    ],
)
def test_fault_32_processes_that_share_the_weights_save_together(folder, case: Case, count):
    require_ended(folder, case, count, *SHARDED)
    if case not in SHARDED_CASES[:FAST_SHARDED]:  # to save time
        require_goes_on(folder, count, *SHARDED)


def train_with_nan(folder: str, rank: int) -> tuple[list[dict[str, float]], str]:
    """Train with a NaN in process ``rank``'s own gradient of one minibatch; return metrics and a digest of weights."""
    metrics: list[dict[str, float]] = []
    trainer = make_trainer(
        folder,
        {"max_skipped_steps": 3},
        {"model": f"{folder}/model", "callbacks": [lambda _, now: metrics.append(now)]},
    )
    if trainer.fixed.processes.rank == rank:
        spoil = lambda: next(p.grad for p in trainer.model.parameters() if p.grad is not None).fill_(math.nan)  # noqa: E731
        before(rlhf_ppo.training.run, "sum_over_processes", 8, spoil)
    trainer.train()
    return metrics, parameters_fingerprint(trainer.model.named_parameters())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("count", "rank"), [(2, 1), pytest.param(2, 0, marks=SLOW), pytest.param(4, 2, marks=SLOW)])
def test_fault_18_one_process_s_non_finite_gradient_skips_the_step_on_all(folder, count, rank):
    one, *others = in_processes(count, train_with_nan, str(folder), rank)
    assert {repr(one)} == {repr(other) for other in others}
    assert [now["optim/skipped_steps"] for now in one[0]] == [0, 1, 0]
    assert len(list((folder / "run").glob("blackbox-*"))) == 1


KILLED_ONCE = """
import os, signal
from pathlib import Path
marker = Path(__file__).with_name("killed")
calls = []

def early_letters(prompts, completions, **columns):
    calls.append(1)
    if len(calls) == 2 and os.environ.get("GROUP_RANK" if "{nodes}" else "RANK") == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getppid() if "{nodes}" else os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum("a" <= x < "n" for x in text) / 7 + len(text) / 71 for text in completions]
"""


def launch(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """Start torchrun, which goes on from checkpoints by itself."""
    given = (
        f"--model model --dataset rows.jsonl --reward rewards.py:early_letters --output-dir run {' '.join(EACH_RUN)}"
    )
    command = [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "rlhf_ppo", "train", *given.split()]
    command += ["--save-every", "1", "--resume-from-checkpoint", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


@pytest.mark.slow
def test_torchrun_starts_the_processes_again_and_the_run_ends_as_if_none_had_been_killed(folder):
    (folder / "rewards.py").write_text(KILLED_ONCE.replace("{nodes}", ""))
    launcher = launch(folder, *"--standalone --nproc-per-node 2 --max-restarts 1".split())
    said = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0 and (folder / "killed").exists(), said
    assert "resuming after iteration 1" in said and said.count("error: process 1 of 2") == 1
    (folder / "rewards.py").write_text(REWARD)
    assert end_of(folder / "run") == run_without_fault(folder, 2)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_machines(folder):
    (folder / "rewards.py").write_text(KILLED_ONCE.replace("{nodes}", "nodes"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"--nnodes 1:2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint localhost:{port} --rdzv-id r"
    flags += " --max-restarts 1 --rdzv-conf last_call_timeout=15"
    stays = launch(folder, *flags.split())
    time.sleep(3)  # it is to hold the store by which they meet
    goes = launch(folder, *flags.split())
    said = stays.communicate(timeout=300)[0]
    assert goes.wait(timeout=60) == -signal.SIGKILL
    assert stays.returncode == 0 and (folder / "killed").exists(), said
    assert "processes      2" in said and "resuming after iteration 1" in said
    assert len(RunDirectory(folder / "run").read()) == 3
