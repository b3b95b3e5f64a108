"""Run a function in several forked processes that are joined by gloo; one that dies ends them all."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_processes(count: int, work: Callable[[int], Any], *, timeout_s: float = 120.0) -> list[Any]:
    """Run ``work(rank)`` in ``count`` processes; returns what each returned, tensors in containers.

    Forked, so that nothing is imported again.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        codes = exit_codes(count, work, folder, timeout_s=timeout_s)
        errors = [file.read_text() for file in sorted(folder.glob("*.error"))]
        assert codes == [0] * count, "\n".join(errors) or f"exit codes {codes} of {count} processes"
        return [torch.load(folder / f"{rank}.result", weights_only=True) for rank in range(count)]


def exit_codes(count: int, work: Callable[[int], Any], folder: Path, *, timeout_s: float = 120.0) -> list[int]:
    """Run ``work(rank)`` in ``count`` processes; returns their exit codes, negative for the signal that ended one.

    As a launcher does, kill the others once one has failed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of libraries, idle here, do not fork
        children = [_fork(rank, count, work, folder) for rank in range(count)]
    until, codes = time.monotonic() + timeout_s, dict[int, int]()
    while len(codes) < count:
        if any(codes.values()) or time.monotonic() > until:
            for pid in set(children) - set(codes):
                os.kill(pid, 9)
        for pid in set(children) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [codes[pid] for pid in children]


def _fork(rank: int, count: int, work: Callable[[int], Any], folder: Path) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        torch.save(work(rank), folder / f"{rank}.result")
        dist.barrier()
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(f"process {rank}: {traceback.format_exc()}")
    finally:
        os._exit(code)
