"""Threads: as many as the model and the machine's CPUs allow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from rlhf_ppo.runtime.processes.launch import read_launch

SMALL = 10_000_000
"""Number of parameters below which a second thread costs as much as it saves."""


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many CPUs this process may use: those of its affinity, at most its container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cpus, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """Return the container's CPU quota in CPUs (cgroup version 2 or 1); infinite without one."""
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{x}_us").read_text() for x in ("quota", "period"))
        return math.inf if quota.strip() in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def choose_threads(model: nn.Module | None = None) -> int:
    """Choose the number of threads for a model: one for a small one, else all usable CPUs; OMP_NUM_THREADS wins.

    The machine's load plays no part: the number of threads decides the order of sums, and a run must be reproducible.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    if model is not None and sum(p.numel() for p in model.parameters()) < SMALL:
        return 1
    # Processes on one machine share its CPUs.
    return min(torch.get_num_threads(), max(1, usable_cpus() // read_launch().local_size))


@contextmanager
def torch_threads(count: int | None, model: nn.Module | None = None) -> Iterator[None]:
    """Run with ``count`` torch threads (None: :func:`choose_threads`) and restore the old number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(choose_threads(model) if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
