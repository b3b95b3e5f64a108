"""ProcessGroup: the processes of one run, what they exchange, and which of them writes.

A rollout is whole on every process; the work on it is divided. What processes exchange is small: the records of a
rollout, and sums of gradients and metrics. Errors are exchanged, too, so that all processes end together and for the
same reason.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from rlhf_ppo.runtime.processes.errors import Agreed, error_facts, error_from_facts
from rlhf_ppo.runtime.processes.launch import read_launch
from rlhf_ppo.runtime.signals import Interrupted

_MESSAGE = "message"
_BUCKET = 2**25
"""Bytes of gradients that are summed in one go."""


class Part(NamedTuple):
    """What one process contributed to an exchange."""

    tensors: dict[str, Tensor]
    """On the CPU, but for this process's own."""
    facts: Any
    """As JSON gives it back, but for this process's own, which are the very objects."""


class ProcessGroup:
    """The processes of one run; made by :func:`join_processes`. By default this process alone."""

    def __init__(self, rank: int = 0, size: int = 1, records: dist.ProcessGroup | None = None) -> None:
        """Describe process ``rank`` of ``size``; ``records`` is torch's group for what is exchanged on the CPU."""
        self.rank, self.size, self._records = rank, size, records
        self.bytes_exchanged = 0
        """What this process has contributed to exchanges and sums."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    # What is divided

    def block(self, count: int, multiple: int = 1) -> range:
        """Return this process's rows among ``count``: consecutive, in whole groups of ``multiple``; may be empty."""
        groups = -(-count // multiple)
        first, last = (groups * rank // self.size * multiple for rank in (self.rank, self.rank + 1))
        return range(first, min(last, count))

    def shares(self, costs: Sequence[int]) -> list[list[int]]:
        """Divide work of these costs evenly; returns which items are each process's, in order (some may have none)."""
        loads, shares = [0] * self.size, [[] for _ in range(self.size)]
        for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
            least = loads.index(min(loads))
            loads[least] += costs[item]
            shares[least].append(item)
        return [sorted(share) for share in shares]

    # What is exchanged

    def exchange(self, work: Callable[[], tuple[Mapping[str, Tensor], Any]]) -> list[Part]:
        """Run ``work`` on each process, and return on each what all of them returned, by rank.

        Args:
            work: returns tensors by name, and facts for JSON. It must not exchange anything itself.
        Raises:
            The error of the first process whose ``work`` failed, on every process.
        """
        if self.alone:
            tensors, facts = work()
            return [Part(dict(tensors), facts)]
        own: Agreed | None = None
        tensors, facts = {}, None
        try:
            tensors, facts = work()
        except (Exception, Interrupted) as error:
            own = error
        message = json.dumps({"facts": facts, "error": None if own is None else error_facts(own)})
        parts: list[Part] = []
        for rank, sent in enumerate(self._gather({n: x.detach().cpu() for n, x in tensors.items()}, message)):
            if (error := sent.facts["error"]) is not None:
                raise (own if rank == self.rank and own is not None else error_from_facts(error, rank, self.size))
            parts.append(Part(sent.tensors, sent.facts["facts"]))
        parts[self.rank] = Part(dict(tensors), facts)
        return parts

    def facts(self, work: Callable[[], Any]) -> list[Any]:
        """Run ``work`` on each process, and return the facts for JSON that each returned; see :meth:`exchange`."""
        return [part.facts for part in self.exchange(lambda: ({}, work()))]

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` on the first process alone, and return on each what it returned; see :meth:`exchange`."""
        return self.facts(lambda: work() if self.first else None)[0]

    def _gather(self, tensors: dict[str, Tensor], message: str) -> list[Part]:
        """Gather tensors and a JSON text, packed as safetensors."""
        own = _bytes(save({**{n: x.contiguous() for n, x in tensors.items()}, _MESSAGE: _bytes(message.encode())}))
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self._records)
        longest = max(int(size) for size in sizes)
        padded = torch.nn.functional.pad(own, (0, longest - len(own)))
        received = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(received, padded, group=self._records)
        self.bytes_exchanged += longest
        parts: list[Part] = []
        for size, sent in zip(sizes, received, strict=True):
            named = load(sent[: int(size)].numpy().tobytes())
            parts.append(Part(named, json.loads(named.pop(_MESSAGE).numpy().tobytes().decode())))
        return parts

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, the same on each process but for their numbers, by their sums over all processes."""
        if self.alone:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([x.reshape(-1) for x in bucket])
            dist.all_reduce(flat)
            self.bytes_exchanged += flat.nbytes
            for x, total in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                x.copy_(total.view_as(x))

    def table(self, numbers: Tensor) -> Tensor:
        """Return numbers [k] of every process, [processes, k]."""
        if self.alone:
            return numbers[None]
        rows = [torch.empty_like(numbers) for _ in range(self.size)]
        dist.all_gather(rows, numbers)
        self.bytes_exchanged += numbers.nbytes
        return torch.stack(rows)


ALONE = ProcessGroup()
"""The group of a process that no launcher started."""

_joined: ProcessGroup | None = None


def join_processes(*, timeout_s: float = 1800.0) -> ProcessGroup:
    """Join the processes that torchrun or accelerate started, once in a process; without a launcher, be alone.

    Args:
        timeout_s: how long a process waits for another, in seconds, at an exchange.
    Raises:
        ValueError: the environment announces processes that cannot be found.
    """
    global _joined
    launch = read_launch()
    if launch.size == 1:
        return ALONE
    if _joined is None:
        timeout = datetime.timedelta(seconds=timeout_s)
        if not dist.is_initialized():
            gpus = torch.cuda.is_available()
            if gpus:
                torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timeout)
        records: Any = dist.new_group(backend="gloo", timeout=timeout)
        _joined = ProcessGroup(launch.rank, launch.size, records)
    return _joined


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors of one dtype, in order, into buckets of about ``_BUCKET`` bytes."""
    buckets: list[list[Tensor]] = []
    size = _BUCKET
    for x in tensors:
        if size >= _BUCKET or buckets[-1][0].dtype != x.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(x)
        size += x.nbytes
    return buckets
