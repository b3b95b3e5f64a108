"""Run a function in several processes that have joined each other: as torchrun would start them, or as plain forks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["rlhf_ppo.trainer"])  # imported once, not once a process


def in_processes(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` in ``count`` processes, and return what each returned; an error of one is raised here.

    Function, arguments and results must be picklable.
    """
    started: list[tuple[Any, Connection]] = []
    for variables in _variables(count):
        receiving, sending = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_run, args=(variables, sending, function, args), daemon=True)
        process.start()
        sending.close()
        started.append((process, receiving))
    results = [_result(rank, receiving) for rank, (_, receiving) in enumerate(started)]
    for process, _ in started:
        process.join()
    failures = [failure for failure, _ in results if failure is not None]
    if failures:
        raise AssertionError("\n".join(failures))
    return [result for _, result in results]


def _variables(count: int) -> list[dict[str, Any]]:
    """Return what a launcher tells each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, **shared} for rank in range(count)]


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Negative for the signal that ended it."""
    said: str
    """On standard output and error."""
    seconds: float
    """Since the first of the processes ended."""


def ended_processes(
    count: int, function: Callable[..., int | None], *args: Any, ranks: Iterable[int] | None = None
) -> list[Ended]:
    """Call ``function(*args)`` in ``count`` processes (or in those with ``ranks``) as a program that exits with what it
    returns, or with the traceback of its error; returns how each ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for variables in _variables(count):
            rank = variables["RANK"]
            if ranks is None or rank in ranks:
                file = Path(folder) / str(rank)
                process = _CONTEXT.Process(target=_run_program, args=(variables, file, function, args))
                process.start()
                processes.append((process, file))
        ends: dict[Any, float] = {}
        limit = time.monotonic() + 120
        while len(ends) < len(processes):
            for process, _ in processes:
                if not process.is_alive():
                    ends.setdefault(process, time.monotonic())
                elif time.monotonic() > limit:
                    process.kill()
            time.sleep(0.02)
        first = min(ends.values())
        return [Ended(process.exitcode, file.read_text(), ends[process] - first) for process, file in processes]


def _run_program(variables: dict[str, Any], file: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a forkserver's children
    try:
        code = function(*args)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.exit(code)


def _result(rank: int, receiving: Connection) -> tuple[str | None, Any]:
    try:
        return receiving.recv()
    except EOFError:
        return f"process {rank} ended without a result", None


def _run(variables: dict[str, Any], sending: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from rlhf_ppo.runtime.processes.join import leave_processes

    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    try:
        sending.send((None, function(*args)))
    except BaseException:
        sending.send((f"process {variables['RANK']}: {traceback.format_exc()}", None))
    if torch.distributed.is_initialized():
        leave_processes()
        torch.distributed.destroy_process_group()


def in_forks(count: int, work: Callable[[int], Any], *, timeout_s: float = 120.0) -> list[Any]:
    """Run ``work(rank)``, which may be a closure, in ``count`` forks of this process that torch's gloo alone joins.

    Returns:
        What each returned: tensors in containers.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        codes = exit_codes_of_forks(count, work, folder, timeout_s=timeout_s)
        errors = [file.read_text() for file in sorted(folder.glob("*.error"))]
        assert codes == [0] * count, "\n".join(errors) or f"exit codes {codes} of {count} processes"
        return [torch.load(folder / f"{rank}.result", weights_only=True) for rank in range(count)]


def exit_codes_of_forks(count: int, work: Callable[[int], Any], folder: Path, *, timeout_s: float = 120.0) -> list[int]:
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


def require_close(one: Any, other: Any) -> None:
    """Everything is equal, but that numbers may differ by 1e-9."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            require_close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            require_close(*pair)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-9, abs=1e-9)
    else:
        assert one == other
