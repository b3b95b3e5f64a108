"""Checkpoints that several processes write together: whole or not at all, whoever dies and whenever."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import exit_codes_of_forks, in_forks

from rlhf_ppo.runtime.checkpoints import stored_tensors
from rlhf_ppo.runtime.checkpoints.checkpoint import list_checkpoints, read_checkpoint, read_manifest, verify_checkpoint
from rlhf_ppo.runtime.checkpoints.checkpoint_commit import write_checkpoint
from rlhf_ppo.runtime.checkpoints.resume import newest_good
from rlhf_ppo.runtime.checkpoints.stored_tensors import Piece
from rlhf_ppo.runtime.processes.group import ProcessGroup

WHOLE = torch.arange(35.0).reshape(7, 5)


def write(root: Path, step: int, rank: int, count: int = 2) -> Path:
    """Write a checkpoint as one of ``count`` processes, each of which holds some rows of a matrix, perhaps none."""
    group = ProcessGroup(rank, count, dist.group.WORLD) if count > 1 else ProcessGroup()
    each = -(-7 // count)
    mine = Piece(WHOLE[rank * each : (rank + 1) * each], min(rank * each, 7), (7, 5))
    tensors = {"trainable": {"matrix": mine, "vector": torch.ones(3)}, "rng": {"x": torch.ones(1)}}
    return write_checkpoint(root, step, tensors=tensors, state={"step": step}, keep=2, processes=group)


@pytest.mark.parametrize("count", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_rows_are_read_from_whichever_process_wrote_them(tmp_path, count):
    in_forks(count, lambda rank: str(write(tmp_path, 1, rank, count)))
    folder = tmp_path / "checkpoint-1"
    assert verify_checkpoint(folder) == [] and read_manifest(folder)["format"] == 2
    stored = read_checkpoint(folder).tensors["trainable"]
    assert dict(stored.shapes) == {"matrix": (7, 5), "vector": (3,)}
    assert torch.equal(stored["matrix"], WHOLE) and torch.equal(stored["vector"], torch.ones(3))
    for first in range(8):
        for rows in range(8 - first):
            assert torch.equal(stored.rows("matrix", first, rows), WHOLE[first : first + rows])
    assert not (folder / "rng.1.safetensors").exists()


def test_a_process_that_fails_to_write_is_everyones_error_and_nothing_is_left(tmp_path):
    def fail_on_second(rank: int) -> str:
        write(tmp_path, 1, rank)
        if rank == 1:
            stored_tensors.save_file = _full
        try:
            write(tmp_path, 2, rank)
        except OSError as error:
            return f"{error.errno} {error.strerror}"
        return "written"

    said = in_forks(2, fail_on_second)
    assert said[0] == said[1] and said[0].startswith(f"{errno.ENOSPC} checkpoint of step 2 could not be written")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-1"]


def test_what_one_process_holds_is_never_committed_alone(tmp_path):
    write_checkpoint(tmp_path, 1, tensors={"trainable": {"matrix": WHOLE}}, state={})
    half = {"trainable": {"matrix": Piece(WHOLE[:4], 0, (7, 5))}}
    with pytest.raises(OSError, match="rows of matrix are missing: a process that holds them has not written"):
        write_checkpoint(tmp_path, 2, tensors=half, state={}, keep=1)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-1"]


def test_damage_to_any_processs_file_is_noticed(tmp_path):
    in_forks(2, lambda rank: str(write(tmp_path, 1, rank)))
    file = tmp_path / "checkpoint-1" / "trainable.1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert [problem.split(":")[0] for problem in verify_checkpoint(file.parent)] == [file.name]


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _count_steps(at_step: Callable[[int], None]) -> None:
    """Call ``at_step`` before each file-system step of a commit in this process, and in the middle of each file."""
    count, originals = 0, {name: getattr(os, name) for name in ("fsync", "rename", "mkdir", "rmdir", "unlink")}
    save_file = stored_tensors.save_file

    def step() -> None:
        nonlocal count
        count += 1
        at_step(count)

    def counted(name: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            step()
            return originals[name](*args, **kwargs)

        return call

    def torn_save(tensors: object, file: Path, metadata: object = None) -> None:
        step()
        file.write_bytes(b"half")
        step()
        save_file(tensors, file, metadata)

    for name in originals:
        setattr(os, name, counted(name))
    stored_tensors.save_file = torn_save


STEPS = {0: 14, 1: 3}
"""Rank -> number of steps that it takes to commit a second checkpoint and delete an older one."""
FEW = [(0, 1), (0, 3), (0, 10), (0, 11), (0, 12), (1, 2), (1, 3)]
ALL = [(rank, step) for rank, steps in STEPS.items() for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("victim", "step"),
    [pytest.param(*point, marks=[] if point in FEW else [pytest.mark.slow]) for point in ALL],
)
def test_fault_21_either_process_killed_at_a_step_leaves_a_checkpoint_to_resume_from(tmp_path, victim, step):
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()

    def die(rank: int) -> None:
        for earlier in (1, 2):
            write(run, earlier, rank)

        def kill(count: int) -> None:
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

        if rank == victim:
            _count_steps(kill)
        write(run, 3, rank)

    codes = exit_codes_of_forks(2, die, scratch)
    assert codes[victim] == -signal.SIGKILL, f"the victim takes fewer than {step} steps"
    good = newest_good(run)
    assert good is not None and good.step in (2, 3)
    assert torch.equal(good.tensors["trainable"]["matrix"], WHOLE)
    in_forks(2, lambda rank: str(write(run, 4, rank)))
    assert [verify_checkpoint(folder) for folder in list_checkpoints(run)] == [[], []]
