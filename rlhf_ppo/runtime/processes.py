"""Processes and threads: one process a run, and as many threads as the model and the machine's CPUs allow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

VARIABLE = "WORLD_SIZE"
"""What torchrun and accelerate set to the number of processes they start."""

SMALL = 10_000_000
"""Parameters below which two threads spend as much on each other as they save."""


def require_one_process() -> None:
    """Raise a ValueError unless the environment says that this process runs alone.

    Several processes are not supported yet: each would train a model of its own in the same folder.
    """
    given = os.environ.get(VARIABLE, "1").strip()
    if given.isdecimal() and int(given) == 1:
        return
    raise ValueError(
        f"{VARIABLE}={given!r} in the environment promises several processes, but training over several processes is "
        f"not supported: start one process, without torchrun or accelerate launch (or unset {VARIABLE})"
    )


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: those of its affinity, at most what its container is given a share of."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cpus, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """CPUs' worth of time that the container may spend (cgroup version 2, or 1); infinite if nothing says."""
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{x}_us").read_text() for x in ("quota", "period"))
        return math.inf if quota.strip() in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def choose_threads(model: nn.Module | None = None) -> int:
    """Threads for a model, unless the user says: one for a small one, every usable CPU for others.

    What else the machine is doing is not looked at: the number of threads decides in which order numbers are added, and
    a run must come out the same whenever it is made.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    if model is not None and sum(p.numel() for p in model.parameters()) < SMALL:
        return 1
    return min(torch.get_num_threads(), usable_cpus())


def require_threads(count: int | None) -> None:
    """Raise a ValueError if the setting num_threads is no number of threads."""
    if count is not None and count < 1:
        raise ValueError(f"num_threads must be 1 or more, or None, got {count}")


@contextmanager
def torch_threads(count: int | None, model: nn.Module | None = None) -> Iterator[None]:
    """Run with ``count`` torch threads (None: :func:`choose_threads`) and put the old number back, whatever happens."""
    before = torch.get_num_threads()
    torch.set_num_threads(choose_threads(model) if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
