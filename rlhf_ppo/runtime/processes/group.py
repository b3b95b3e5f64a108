"""ProcessGroup: the processes of one run, what they exchange, and which of them writes.

A rollout is whole on every process; the work on it is divided. What processes exchange is small: the records of a
rollout, and sums of gradients and metrics. Errors are exchanged, too, so that all processes end together and for the
same reason.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.runtime.processes.errors import (
    Agreed,
    OtherProcessError,
    causes,
    error_facts,
    error_from_facts,
    is_raised_elsewhere,
)
from rlhf_ppo.runtime.processes.watch import Watch
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
    """The processes of one run; made by ``join_processes`` in join.py. By default this process alone."""

    def __init__(
        self, rank: int = 0, size: int = 1, records: dist.ProcessGroup | None = None, watch: Watch | None = None
    ) -> None:
        """Describe process ``rank`` of ``size``.

        Args:
            records: torch's group for what is exchanged on the CPU.
            watch: notices failures of the others.
        """
        self.rank, self.size, self._records, self.watch = rank, size, records, watch
        self._agreed: BaseException | None = None
        """The last error of this process that the others have raised, too."""
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

    def set_timeout(self, seconds: float) -> None:
        """Set how long a process waits for another at an exchange or a sum."""
        if self.watch is not None:
            self.watch.timeout_s = seconds
            for group in (dist.group.WORLD, self._records):
                # torch has it under this name alone.
                dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)

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
            The error of the first process whose ``work`` failed, on every process; an OtherProcessError if one has
            failed otherwise, or been killed.
        """
        return self._exchange(work, _name(work))

    def _exchange(self, work: Callable[[], tuple[Mapping[str, Tensor], Any]], place: str) -> list[Part]:
        if self.alone:
            tensors, facts = work()
            return [Part(dict(tensors), facts)]
        own: Agreed | None = None
        tensors, facts = {}, None
        try:
            tensors, facts = work()
        except (Exception, Interrupted) as error:
            own = error
        message = json.dumps({"facts": facts, "error": None if own is None else error_facts(own), "place": place})
        parts: list[Part] = []
        for rank, sent in enumerate(self._gather({n: x.detach().cpu() for n, x in tensors.items()}, message)):
            if (error := sent.facts["error"]) is not None:
                self._agreed = own
                raise (own if rank == self.rank and own is not None else error_from_facts(error, rank, self.size))
            if (other := sent.facts["place"]) != place:
                first, second = sorted([(self.rank, place), (rank, other)])
                raise RunError(
                    f"process {first[0]} is in {first[1]} where process {second[0]} is in {second[1]}: all processes "
                    "must do the same (a callback that calls the trainer on one of them alone?)"
                )
            parts.append(Part(sent.tensors, sent.facts["facts"]))
        parts[self.rank] = Part(dict(tensors), facts)
        return parts

    def facts(self, work: Callable[[], Any]) -> list[Any]:
        """Run ``work`` on each process, and return the facts for JSON that each returned; see :meth:`exchange`."""
        return self._facts(work, _name(work))

    def _facts(self, work: Callable[[], Any], place: str) -> list[Any]:
        return [part.facts for part in self._exchange(lambda: ({}, work()), place)]

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` on the first process alone, and return on each what it returned; see :meth:`exchange`."""
        return self._facts(lambda: work() if self.first else None, _name(work))[0]

    # What fails

    @property
    def broken(self) -> bool:
        """Whether a process has failed, so that nothing can be exchanged any more."""
        return self.watch is not None and self.watch.failure is not None

    @property
    def survivors(self) -> ProcessGroup:
        """The processes that can still do something together: all, or this one alone once another has failed."""
        return ALONE if self.broken else self

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others that this process ends by an error, unless they raise it, too.

        Returns:
            The error, or an OtherProcessError if it is the consequence of another process's.
        """
        raised_by_all = is_raised_elsewhere(error) or any(x is self._agreed for x in causes(error))
        if self.watch is None or raised_by_all or isinstance(error, OtherProcessError):
            return error
        failure = self.watch.fail(error)
        return error if failure.rank == self.rank else OtherProcessError(failure, self.size)

    def saving(self) -> AbstractContextManager[None]:
        """Mark a block after which the first process has something to save, also when another one fails in it."""
        return nullcontext() if self.watch is None else self.watch.saving()

    def _waiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self.watch is None else self.watch.waiting()

    def _gather(self, tensors: dict[str, Tensor], message: str) -> list[Part]:
        """Gather tensors and a JSON text, packed as safetensors."""
        own = _bytes(save({**{n: x.contiguous() for n, x in tensors.items()}, _MESSAGE: _bytes(message.encode())}))
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with self._waiting():
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
            with self._waiting():
                dist.all_reduce(flat)
            self.bytes_exchanged += flat.nbytes
            for x, total in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                x.copy_(total.view_as(x))

    def table(self, numbers: Tensor) -> Tensor:
        """Return numbers [k] of every process, [processes, k]."""
        if self.alone:
            return numbers[None]
        rows = [torch.empty_like(numbers) for _ in range(self.size)]
        with self._waiting():
            dist.all_gather(rows, numbers)
        self.bytes_exchanged += numbers.nbytes
        return torch.stack(rows)


ALONE = ProcessGroup()
"""The group of a process that no launcher started."""


def _name(work: Callable[[], Any]) -> str:
    work = getattr(work, "func", work)  # a partial's
    return f"{work.__module__}.{work.__qualname__}".replace(".<locals>", "").replace(".<lambda>", "")


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
