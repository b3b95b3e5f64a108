"""Run a function in several processes that have joined each other, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["rlhf_ppo.trainer"])  # imported once, not once a process


def in_processes(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` in ``count`` processes, and return what each returned; an error of one is raised here.

    Function, arguments and results must be picklable.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started: list[tuple[Any, Connection]] = []
    for rank in range(count):
        receiving, sending = _CONTEXT.Pipe(duplex=False)
        variables = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
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


def _result(rank: int, receiving: Connection) -> tuple[str | None, Any]:
    try:
        return receiving.recv()
    except EOFError:
        return f"process {rank} ended without a result", None


def _run(variables: dict[str, Any], sending: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    try:
        sending.send((None, function(*args)))
    except BaseException:
        sending.send((f"process {variables['RANK']}: {traceback.format_exc()}", None))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
