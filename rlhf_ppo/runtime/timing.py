"""Timing: how long each phase of an iteration took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds of named phases."""

    def __init__(self, device: torch.device) -> None:
        """``device``: waited for at the end of each phase, so that its work is counted where it belongs."""
        self.device = device
        self._seconds: dict[str, float] = {}
        self._show: Callable[[str], None] | None = None

    @contextmanager
    def shown_by(self, show: Callable[[str], None]) -> Iterator[None]:
        """Inside, call ``show`` with the name of each phase that begins."""
        self._show = show
        try:
            yield
        finally:
            self._show = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as ``name``."""
        if self._show is not None:
            self._show(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken
