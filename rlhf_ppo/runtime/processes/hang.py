"""Hang: which process did not come to the others, and what it is doing instead."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import NamedTuple

from rlhf_ppo.runtime.processes.errors import Failure

ANSWER_S = 2.0
"""Seconds to wait for another process's watch."""


class Whereabouts(NamedTuple):
    """Where a process is."""

    arrived: int
    """How often it has come to a wait."""
    place: str
    waits: bool
    """It is inside a function of torch.distributed, or has left one because the others did not come."""


class Hang:
    """A process has waited too long; what the others say about where they are."""

    def __init__(self, size: int, count: int, limit_s: float) -> None:
        """Begin to ask: one of ``size`` processes has waited ``limit_s`` seconds at its ``count``th wait."""
        self.size, self.count, self.limit_s = size, count, limit_s
        self.found: dict[int, Whereabouts] = {}
        self._until = time.monotonic() + ANSWER_S

    def is_settled(self) -> bool:
        """Whether all have answered, or have had the time to."""
        return len(self.found) == self.size or time.monotonic() > self._until

    def failure(self) -> Failure:
        """Name the processes that did not come."""
        late = [r for r in range(self.size) if r not in self.found or self.found[r].arrived < self.count]
        # Inside a pass that processes compute together not every wait is counted.
        late = late or [r for r in range(self.size) if not self.found[r].waits]
        named = late or range(self.size)  # they wait for each other
        places = {r: found.place for r, found in self.found.items()}
        where = [f"process {r} of {self.size} ({places.get(r, 'no answer')})" for r in named]
        message = (
            f"{' and '.join(where)} did not come to the others within process_timeout_s={self.limit_s:g}: it hangs, "
            "or needs longer; then raise process_timeout_s"
        )
        speaker = next((r for r in range(self.size) if r not in late), 0)
        return Failure(late[0] if late else 0, message, 1, speaker=speaker)


def own_whereabouts(arrived: int, *, has_waited: bool) -> Whereabouts:
    """Return where this process's main thread is: the innermost line that is neither Python's own nor a library's."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    libraries, exchange = (os.path.dirname(os.__file__), "<frozen"), os.path.join("torch", "distributed", "")
    found, waits = frame, has_waited
    while frame is not None and frame.f_code.co_filename.startswith(libraries):
        waits |= exchange in frame.f_code.co_filename
        frame = frame.f_back
    found = frame or found
    place = "nowhere" if found is None else f"in {found.f_code.co_name}, {found.f_code.co_filename}:{found.f_lineno}"
    return Whereabouts(arrived, place, waits)
