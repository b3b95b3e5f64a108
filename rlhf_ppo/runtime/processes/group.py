"""ProcessGroup: the processes of one run, what they exchange, and which of them writes.

A rollout is whole on every process; the work on it is divided. What processes exchange is small: the records of a
rollout, and sums of gradients and metrics. Errors are exchanged, too, so that all processes end together and for the
same reason.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.runtime.machine.signals import Interrupted, deferring_stops, stopping_if_asked
from rlhf_ppo.runtime.processes.errors import (
    Agreed,
    OtherProcessError,
    causes,
    error_facts,
    error_from_facts,
    is_raised_elsewhere,
)
from rlhf_ppo.runtime.processes.messages import buckets, pack, unpack
from rlhf_ppo.runtime.processes.watch import SAVING_S, Watch

Work = Callable[[], tuple[Mapping[str, Tensor], Any]]
"""What an exchange runs on each process: it returns tensors by name, and facts for JSON."""


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
        self._in_step = True
        """Whether no error has ended a block of :meth:`computing_together`, in which the others then still wait."""
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
                _limit(group, seconds)

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

    def exchange(self, work: Work) -> list[Part]:
        """Run ``work`` on each process, and return on each what all of them returned, by rank.

        Args:
            work: must not exchange anything itself.
        Raises:
            The error of the first process whose ``work`` failed, on every process; an OtherProcessError if one has
            failed otherwise, or been killed.
        """
        return self._exchange(work, _name(work))

    def _exchange(
        self,
        work: Work,
        place: str,
        waiting: AbstractContextManager[None] | None = None,
    ) -> list[Part]:
        if self.alone:
            tensors, facts = work()
            return [Part(dict(tensors), facts)]
        own: Agreed | None = None
        tensors, facts, told = {}, None, "null"
        try:
            tensors, facts = work()
            told = json.dumps(facts)
        except (Exception, Interrupted) as error:
            own = error
        others = json.dumps({"error": None if own is None else error_facts(own), "place": place})
        message = f'{{"facts": {told}, {others[1:]}'
        named, waiting = {n: x.detach().cpu() for n, x in tensors.items()}, waiting or self._waiting()
        gathered, parts = self._gather(named, message, waiting), list[Part]()
        for rank, sent in enumerate(gathered):
            if (error := sent.facts["error"]) is not None:
                self._agreed = own
                raise (own if rank == self.rank and own is not None else error_from_facts(error, rank, self.size))
        for rank, sent in enumerate(gathered):
            if (other := sent.facts["place"]) != place:
                first, second = sorted([(self.rank, place), (rank, other)])
                raise RunError(
                    f"process {first[0]} is in {first[1]} where process {second[0]} is in {second[1]}: all processes "
                    "must do the same (a callback that calls the trainer on one of them alone?)"
                )
            parts.append(Part(sent.tensors, sent.facts["facts"]))
        parts[self.rank] = Part(dict(tensors), facts)
        return parts

    def exchange_together(self, work: Work) -> list[Part]:
        """Run ``work``, in which the processes compute together, on each process; then see :meth:`exchange`."""
        with self.computing_together():
            result = work()
        return self._exchange(lambda: stopping_if_asked(result), _name(work))

    @contextmanager
    def computing_together(self) -> Iterator[None]:
        """Let nothing inside be a safe point: other processes compute together with this one, step by step."""
        with deferring_stops():
            self._in_step = False
            yield
            self._in_step = True

    def facts(self, work: Callable[[], Any]) -> list[Any]:
        """Run ``work`` on each process, and return the facts for JSON that each returned; see :meth:`exchange`."""
        return self._facts(work, _name(work))

    def _facts(self, work: Callable[[], Any], place: str) -> list[Any]:
        return [part.facts for part in self._exchange(lambda: ({}, work()), place)]

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` on the first process alone, and return on each what it returned; see :meth:`exchange`."""
        return self._facts(lambda: work() if self.first else None, _name(work))[0]

    def note_traffic(self, contributed: int) -> None:
        """Count bytes that were exchanged elsewhere, where processes wait for each other, too."""
        self.bytes_exchanged += contributed
        if self.watch is not None:
            self.watch.arrived += 1

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
        if self.watch is None or self._is_shared(error):
            return error
        failure = self.watch.fail(error)
        return error if failure.rank == self.rank else OtherProcessError(failure, self.size)

    def hand_over(self, error: BaseException) -> BaseException:
        """Let the others raise this process's error at the exchange that they come to, so that all end together.

        Returns:
            What all of them raise. The error itself if they already do, or do not come within ``SAVING_S`` seconds, or
            cannot because they wait for a step that this process will not take; then :meth:`fail` is what is left.
        """
        if self.watch is None or self._is_shared(error) or not (self._in_step and isinstance(error, Agreed)):
            return error

        def raise_it() -> tuple[Mapping[str, Tensor], Any]:
            raise error

        self.watch.arrived += 1
        _limit(self._records, SAVING_S)
        try:
            self._exchange(raise_it, "", nullcontext())
        except (Exception, Interrupted) as raised:
            return raised if self._is_shared(raised) else error
        finally:
            _limit(self._records, self.watch.timeout_s)
        return error

    def _is_shared(self, error: BaseException) -> bool:
        """Whether the others know of an error: they raise it, too, or it was one of them that failed."""
        reworded = causes(error.__context__)  # in an except block, on its way here
        agreed = any(x is self._agreed for x in (*causes(error), *reworded))
        return agreed or is_raised_elsewhere(error) or isinstance(error, OtherProcessError)

    def saving(self) -> AbstractContextManager[None]:
        """Mark a block after which the first process has something to save, also when another one fails in it."""
        return nullcontext() if self.watch is None else self.watch.saving()

    def _waiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self.watch is None else self.watch.waiting()

    def _gather(self, tensors: dict[str, Tensor], message: str, waiting: AbstractContextManager[None]) -> list[Part]:
        """Gather tensors and a JSON text."""
        own = pack(tensors, message)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with waiting:
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self._records)
            longest = max(int(size) for size in sizes)
            padded = torch.nn.functional.pad(own, (0, longest - len(own)))
            received = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(received, padded, group=self._records)
        self.bytes_exchanged += longest
        return [Part(*unpack(sent[: int(size)])) for size, sent in zip(sizes, received, strict=True)]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, the same on each process but for their numbers, by their sums over all processes."""
        if self.alone:
            return
        for bucket in buckets(tensors):
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


def _limit(group: dist.ProcessGroup | None, seconds: float) -> None:
    """Set how long a process waits for another in a group of torch's."""
    # torch has it under this name alone.
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)
