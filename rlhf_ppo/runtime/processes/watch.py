"""Watch: each process learns within seconds that another has failed, was killed or hangs, and why.

Apart from torch's groups: what a collective waits for may never come, and the error that it then raises is not the
cause. Each process keeps a connection to the first one. The operating system closes it when a process is killed, and
notices in :data:`UNREACHABLE_S` seconds when a machine or the network between two is gone.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rlhf_ppo.runtime.machine import signals
from rlhf_ppo.runtime.processes.errors import Failure, OtherProcessError, describe, exit_code, is_of_a_collective
from rlhf_ppo.runtime.processes.hang import ANSWER_S, Hang, Whereabouts, own_whereabouts
from rlhf_ppo.runtime.processes.lines import Address, Line, connect, listen

GRACE_S = 3.0
"""Seconds in which a process must end by itself once another has failed."""
SAVING_S = 20.0
"""The same for the first process while it has something to save: to reach a point where it can."""
POLL_S = 0.2


class Watch:
    """One process's view of the others: its thread reads their messages and ends the process when it must."""

    def __init__(self, rank: int, size: int) -> None:
        """Describe process ``rank`` of ``size``; :meth:`start` connects it with the others."""
        self.rank, self.size = rank, size
        self.timeout_s = 0.0
        """How long a process waits for another, for messages."""
        self.arrived = 0
        """Exchanges and sums that this process has come to."""
        self._patience_s = GRACE_S
        self._failure: Failure | None = None
        self._failed_at = 0.0
        self._heeded = False
        self._changed = threading.Condition()
        self._selector = selectors.DefaultSelector()
        self._lines: dict[int, Line] = {}
        self._left: set[int] = set()
        self._said: set[str] = set()
        self._answers: dict[str, bool] = {}
        self._hang: Hang | None = None
        self._waited_in_vain = False
        self._passed_on: int | None = None
        self._heard_at: float | None = None

    @property
    def failure(self) -> Failure | None:
        """Why all processes end; None while nothing has failed."""
        return self._failure

    def start(self, tell: Callable[[Address | None], Address], *, local: bool) -> None:
        """Connect with the others, and begin to watch.

        Args:
            tell: gives the first process's address to all of them.
            local: all processes are on this machine.
        """
        if self.rank == 0:
            server, address = listen(local=local)
            tell(address)
            self._selector.register(server, selectors.EVENT_READ, (server, address.token))
        else:
            self._add(0, connect(tell(None), self.rank))
        os.register_at_fork(after_in_child=self._forget)
        signals.also_stop_if(self.require_whole)
        signals.announce_by_itself(False)
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def leave(self) -> None:
        """Tell the others that this process ends, and that nothing is wrong."""
        self._send_all({"left": self.rank})
        self._forget()

    # What the main thread asks

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for the others inside the block.

        Raises:
            OtherProcessError: another process has failed, also if that made torch's collective fail.
        """
        self.require_whole()
        self.arrived += 1
        try:
            yield
        except RuntimeError as error:
            raise self._explain(error) from None

    def require_whole(self) -> None:
        """Raise an OtherProcessError if a process has failed."""
        if self._failure is not None:
            raise self._heed(self._failure)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Give the first process more time to end by itself during the block: it has something to save."""
        before, self._patience_s = self._patience_s, SAVING_S if self.rank == 0 else GRACE_S
        try:
            yield
        finally:
            self._patience_s = before

    def fail(self, error: BaseException) -> Failure:
        """Tell the others that this process ends by ``error``; returns the first failure of all processes."""
        if isinstance(error, RuntimeError) and is_of_a_collective(error):
            return self._explain(error).failure  # a consequence
        # What ends by sys.exit() prints nothing of its own.
        speaker = self.rank if not isinstance(error, SystemExit) else int(self.rank == 0)
        own = Failure(self.rank, describe(error), exit_code(error), speaker=speaker)
        self._report(own)
        self._heeded = True
        return self._failure or own

    def may_say(self, text: str) -> bool:
        """Return whether no other process has said ``text``, and count it as said."""
        key = hashlib.sha256(text.encode()).hexdigest()
        if self.rank == 0:
            return self._first_to_say(key)
        self._answers.pop(key, None)
        if not self._send(0, {"say": key}):
            return False  # the first process has ended, and has said what all of them say
        self._wait_until(lambda: key in self._answers, ANSWER_S)
        return self._answers.get(key, True)

    # Failures

    def _report(self, failure: Failure) -> None:
        if self.rank != 0 and self._send(0, {"failed": failure}):
            self._wait_until(lambda: self._failure is not None, ANSWER_S)
        self._decide(failure)

    def _decide(self, failure: Failure) -> None:
        """Take a failure for the cause if it is the first."""
        with self._changed:
            if self._failure is not None:
                return
            self._failure, self._failed_at = failure, time.monotonic()
            self._changed.notify_all()
        if self.rank == 0:
            self._send_all({"failed": failure})

    def _heed(self, failure: Failure) -> OtherProcessError:
        self._heeded = True
        return OtherProcessError(failure, self.size)

    def _explain(self, error: RuntimeError) -> OtherProcessError:
        """Find out why a collective failed."""
        if "time" in str(error).lower() and self._failure is None:
            self._waited_in_vain = True
            late = {"late": self.arrived, "limit": self.timeout_s}
            self._ask_where(late) if self.rank == 0 else self._send(0, late)
        self._wait_until(lambda: self._failure is not None, ANSWER_S + GRACE_S)
        if self._failure is None:
            gone = ", ".join(map(str, sorted(self._left)))
            message = f"process {gone} of {self.size} has ended before the others" if gone else f"{error}"
            self._report(Failure(self.rank, message, 1, speaker=self.rank))
        assert self._failure is not None
        return self._heed(self._failure)

    def _lost(self, rank: int, line: Line) -> None:
        """Note that a connection has ended."""
        self._selector.unregister(line.socket)
        line.socket.close()
        del self._lines[rank]
        if rank in self._left:
            return
        speaker = 0 if rank else 1
        self._decide(Failure(rank, f"process {rank} of {self.size} ({line.peer}) {line.end}", 1, speaker=speaker))

    def _end_if_unheeded(self) -> None:
        """End this process if its main thread does not, because it waits for what will not come."""
        failure = self._failure
        if failure is None or self._heeded:
            return
        patience_s = GRACE_S if failure.rank == self.rank else self._patience_s  # a hanging process saves nothing
        if time.monotonic() < self._failed_at + patience_s:
            return
        if failure.speaker == self.rank:
            os.write(2, f"error: {OtherProcessError(failure, self.size)}\n".encode())
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(failure.exit_code)

    # What the thread does

    def _run(self) -> None:
        while True:
            try:
                for key, _ in self._selector.select(POLL_S):
                    self._read(key.data)
            except (OSError, ValueError, KeyError):
                return  # closed by leave()
            self._watch_signals()
            if self._hang is not None and self._hang.is_settled():
                (hang, self._hang) = (self._hang, None)
                self._decide(hang.failure())
            self._end_if_unheeded()

    def _read(self, data: Any) -> None:
        if isinstance(data, tuple):
            server, token = data
            with suppress(OSError, ValueError):
                rank, line = Line.accepted(server, token)
                self._add(rank, line)
            return
        rank, line = next((r, x) for r, x in self._lines.items() if x is data)
        for message in line.receive():
            self._handle(rank, message)
        if line.end:
            self._lost(rank, line)

    def _handle(self, rank: int, message: dict[str, Any]) -> None:
        match message:
            case {"failed": failure}:
                self._decide(Failure(*failure))
            case {"left": gone}:
                self._left.add(gone)
                if self.rank == 0:
                    self._send_all(message)
            case {"say": key}:
                self._send(rank, {"may": key, "say_it": self._first_to_say(key)})
            case {"may": key, "say_it": allowed}:
                with self._changed:
                    self._answers[key] = allowed
                    self._changed.notify_all()
            case {"signal": number}:
                signals.hear(number)
            case {"late": _}:
                self._ask_where(message)
            case {"where": _}:
                self._send(0, {"here": self._here()})
            case {"here": where} if self._hang is not None:
                self._hang.found[rank] = Whereabouts(*where)

    def _ask_where(self, late: dict[str, Any]) -> None:
        """Ask each process where it is, because one has waited too long."""
        if self._hang is None and self._failure is None:
            hang = Hang(self.size, late["late"], late["limit"])
            hang.found[0] = self._here()
            self._hang = hang
            self._send_all({"where": None})

    def _here(self) -> Whereabouts:
        return own_whereabouts(self.arrived, has_waited=self._waited_in_vain)

    def _watch_signals(self) -> None:
        """Pass a signal on to the others, and say once that it was heard, unless it came because another failed."""
        number = signals.heard()
        if number is not None and number != self._passed_on:
            self._heard_at = time.monotonic()
            self._send_all({"signal": number})
        self._passed_on = number
        heard_at = self._heard_at
        if number is not None and heard_at is not None and time.monotonic() > heard_at + 2 * POLL_S:
            self._heard_at = None
            if self.rank == 0 and self._failure is None:
                signals.announce(number)

    def _first_to_say(self, key: str) -> bool:
        with self._changed:
            said = len(self._said)
            self._said.add(key)
            return len(self._said) > said

    # Connections

    def _add(self, rank: int, line: Line) -> None:
        self._lines[rank] = line
        self._selector.register(line.socket, selectors.EVENT_READ, line)

    def _send(self, rank: int, message: dict[str, Any]) -> bool:
        line = self._lines.get(rank)
        return line is not None and line.send(message)

    def _send_all(self, message: dict[str, Any]) -> None:
        for rank in list(self._lines):
            self._send(rank, message)

    def _forget(self) -> None:
        """Close the connections; in a forked child, so that they end with this process alone."""
        for line in list(self._lines.values()):
            line.socket.close()
        self._selector.close()

    def _wait_until(self, done: Callable[[], bool], seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(done, seconds)
