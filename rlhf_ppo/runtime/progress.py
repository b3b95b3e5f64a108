"""Live progress: a bar with the latest numbers on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressDisplay:
    """Shows ``done`` of ``total`` and a few numbers; without a terminal, one line now and then.

    Args:
        description: what is counted.
        total: the count at the end.
        every_s: least seconds between two plain lines.
        quiet: show nothing.
    """

    def __init__(self, description: str, total: int, *, every_s: float = 10.0, quiet: bool = False) -> None:
        self.description, self.total, self.every_s, self.quiet = description, total, every_s, quiet
        self.console = Console(file=sys.stderr)
        self._last_line = float("-inf")
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),  # a name may hold [/x]
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
        )

    def __enter__(self) -> ProgressDisplay:
        if self._live:
            self._task = self._bar.add_task(self.description, total=self.total, numbers="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    @property
    def _live(self) -> bool:
        return self.console.is_terminal and not self.quiet

    def update(self, done: int, **numbers: float) -> None:
        """Show the count and the numbers, three significant digits each."""
        text = "  ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in numbers.items())
        if self._live:
            self._bar.update(self._task, completed=done, numbers=text)
        elif not self.quiet and (time.monotonic() - self._last_line >= self.every_s or done >= self.total):
            self._last_line = time.monotonic()
            print(f"{self.description} {done}/{self.total}  {text}", file=sys.stderr, flush=True)
