"""Hang: which process did not come to the others, and what it is doing instead."""

from __future__ import annotations

import os
import sys
import threading
import time

from rlhf_ppo.runtime.processes.errors import Failure

ANSWER_S = 2.0
"""Seconds to wait for another process's watch."""


class Hang:
    """A process has waited too long; what the others say about where they are."""

    def __init__(self, size: int, count: int, limit_s: float) -> None:
        """Begin to ask: one of ``size`` processes has waited ``limit_s`` seconds at its ``count``th wait."""
        self.size, self.count, self.limit_s = size, count, limit_s
        self.found: dict[int, tuple[int, str]] = {}
        """Rank -> how often it has come to a wait, and where it is."""
        self._until = time.monotonic() + ANSWER_S

    def is_settled(self) -> bool:
        """Whether all have answered, or have had the time to."""
        return len(self.found) == self.size or time.monotonic() > self._until

    def failure(self) -> Failure:
        """Name the processes that did not come."""
        late = [r for r in range(self.size) if r not in self.found or self.found[r][0] < self.count]
        named = late or range(self.size)  # none is behind: they wait for each other
        where = [f"process {r} of {self.size} ({self.found[r][1] if r in self.found else 'no answer'})" for r in named]
        message = (
            f"{' and '.join(where)} did not come to the others within process_timeout_s={self.limit_s:g}: it hangs, "
            "or needs longer; then raise process_timeout_s"
        )
        speaker = next((r for r in range(self.size) if r not in late), 0)
        return Failure(late[0] if late else 0, message, 1, speaker=speaker)


def place_of_main_thread() -> str:
    """Return where this process's main thread is: the innermost line that is neither Python's own nor a library's."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    libraries = (os.path.dirname(os.__file__), "<frozen")
    found = frame
    while frame is not None and frame.f_code.co_filename.startswith(libraries):
        frame = frame.f_back
    found = frame or found
    return "nowhere" if found is None else f"in {found.f_code.co_name}, {found.f_code.co_filename}:{found.f_lineno}"
