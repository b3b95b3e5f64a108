"""Show a run's progress: a summary at its start, a live bar or plain lines, and the seconds of each phase."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text
from torch import nn

from rlhf_ppo.runtime import package
from rlhf_ppo.runtime.logs.panel import RunPanel
from rlhf_ppo.runtime.machine.threads import usable_cpus

PHASES = {
    "collect": "collecting",
    "generate": "generating",
    "reference": "reading reference",
    "score": "scoring",
    "judge": "judging",
    "replay": "reading rollout",
    "update": "updating",
    "record": "recording tokens",
}
"""Phase -> its text while it lasts; other names are shown as they are."""


class _Bar(Progress):
    """One line for the count, the times and the phase, and the numbers; each at most as wide as the terminal."""

    numbers = ""
    panel: RunPanel | None = None

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.numbers, no_wrap=True, overflow="ellipsis") if self.panel is None else self.panel


def _column(text: str, **column: object) -> TextColumn:
    # Not as markup: a name may hold [/x].
    return TextColumn(text, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", **column))  # type: ignore[arg-type]


class ProgressDisplay:
    """Display of ``done`` of ``total``, the phase and a few numbers; without a terminal as occasional plain lines.

    Args:
        description: what is counted.
        total: the count at the end.
        each: what is counted between two updates: iteration, step.
        every_s: minimum seconds between two plain lines.
        quiet: show nothing.
        panel: what a terminal shows instead of the numbers, of which it then shows the time per step alone.
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        each: str = "iteration",
        every_s: float = 10.0,
        quiet: bool = False,
        panel: RunPanel | None = None,
    ) -> None:
        self.description, self.total, self.each = description, total, each
        self.every_s, self.quiet = every_s, quiet
        self.console = Console(file=sys.stderr)
        self.done = 0
        self._last_line = float("-inf")
        self._aside_s, self._is_aside = 0.0, False
        self._steps: deque[tuple[float, int]] = deque(maxlen=21)
        """(time, done) of the last 20 steps and of their start."""
        self._bar = _Bar(
            _column("{task.description}", max_width=24),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            _column("{task.fields[left]}", min_width=12),
            _column("{task.fields[phase]}", min_width=max(map(len, PHASES.values())), style="dim"),
            console=self.console,
            expand=True,
        )
        self._bar.panel = panel

    def __enter__(self) -> ProgressDisplay:
        if self._live:
            self._task = self._bar.add_task(self.description, total=self.total, left="", phase="")
            self._bar.start()
        self.start(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.update(self._task, phase="")
            self._bar.stop()

    @property
    def _live(self) -> bool:
        return self.console.is_terminal and not self.quiet

    def start(self, done: int) -> None:
        """Set what is already done; the time per step is measured from here."""
        self.done = done
        self._steps.clear()
        self._steps.append((self._now(), done))
        if self._live:
            self._bar.update(self._task, completed=done)

    def update(self, done: int, **numbers: float) -> None:
        """Show the count, the time per step, the time left, and the numbers to three significant digits."""
        self.done = done
        self._steps.append((self._now(), done))
        left, each = self._times()
        shown = [each, *(f"{name.replace('_', ' ')} {value:.3g}" for name, value in numbers.items())]
        text = "  ".join(filter(None, shown))
        if self._live:
            self._bar.numbers = text
            self._bar.update(self._task, completed=done, left=left if self._bar.panel is None else f"{left}  {each}")
        else:
            first = len(self._steps) == 2  # so that the time left is known at once
            self._line("  ".join(filter(None, (left, text))), now=first or done >= self.total)

    def show(self, numbers: Mapping[str, float], sample: tuple[str, str, float | None] | None = None) -> None:
        """Give the panel an update's metrics, and a prompt with a response and its score, to show from now on.

        Without a number "speed" it is what is counted, per second.
        """
        if self._bar.panel is not None:
            (then, first), (now, last) = self._steps[0], self._steps[-1]
            pace = {"speed": (last - first) / (now - then)} if now > then else {}
            self._bar.panel.add({**pace, **numbers}, sample)

    def phase(self, name: str) -> None:
        """Show the current phase."""
        if self._is_aside:
            return
        word = PHASES.get(name, name)
        if self._live:
            self._bar.update(self._task, phase=word)
        else:
            self._line(word)

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Show ``name`` during the block, such as an evaluation, and leave its time out of the time per step."""
        self.phase(name)
        started, self._is_aside = time.monotonic(), True
        try:
            yield
        finally:
            self._aside_s, self._is_aside = self._aside_s + time.monotonic() - started, False

    def _now(self) -> float:
        return time.monotonic() - self._aside_s

    def _times(self) -> tuple[str, str]:
        """Return time left (empty at the end) and time per step, from the last 20 steps."""
        (then, first), (now, last) = self._steps[0], self._steps[-1]
        if last <= first:
            return "", ""
        left = (now - then) / (last - first) * (self.total - last)
        each = f"{_seconds((now - then) / (len(self._steps) - 1))}/{self.each}"
        return f"{_clock(left)} left" if left > 0 else "", each

    def _line(self, text: str, *, now: bool = False) -> None:
        if not self.quiet and (now or time.monotonic() - self._last_line >= self.every_s):
            self._last_line = time.monotonic()
            print(f"{self.description} {self.done}/{self.total}  {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))


def _seconds(seconds: float) -> str:
    if seconds >= 100:
        return _clock(seconds)
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


class Phases(NamedTuple):
    """What named phases took."""

    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    """The most memory that tensors held during each, on a CUDA device; {} on others: what a process holds on a CPU is
    mostly libraries and what its allocator keeps, whichever phase needed it."""


class Stopwatch:
    """Total seconds of named phases, and on a CUDA device their peaks of memory."""

    def __init__(self, device: torch.device) -> None:
        """Start at 0; ``device`` is synchronised at the end of each phase, so that its work is counted there."""
        self.device = device
        self._phases = Phases({}, {})
        self._show: Callable[[str], None] | None = None

    @contextmanager
    def shown_by(self, show: Callable[[str], None]) -> Iterator[None]:
        """Call ``show`` with the name of each phase that begins during the block."""
        self._show = show
        try:
            yield
        finally:
            self._show = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time and memory as ``name``; phases are not nested."""
        if self._show is not None:
            self._show(name)
        on_cuda, (seconds, peaks) = self.device.type == "cuda", self._phases
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)  # the allocator's counter: nothing waits
        started = time.perf_counter()
        try:
            yield
        finally:
            if on_cuda:
                torch.cuda.synchronize(self.device)
                peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(self.device))
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> Phases:
        """Return what each phase has taken since the last call, and start again."""
        taken, self._phases = self._phases, Phases({}, {})
        return taken


def model_rows(name: str, model: nn.Module, *, device: torch.device, bf16: bool) -> dict[str, str]:
    """Return the summary's rows on a model: its parameters, device, precision and threads."""
    parameters = list(model.parameters())  # shared ones once
    total = count_parameters(parameters)
    trained = count_parameters(p for p in parameters if p.requires_grad)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    threads = f"{torch.get_num_threads()} on {usable_cpus()} CPUs"
    if package.THREADS_SPIN and torch.get_num_threads() > 1:
        threads += "; waiting threads spin: import rlhf_ppo before torch, or set OMP_WAIT_POLICY=PASSIVE"
    return {
        "model": name,
        "trained": f"{short_count(trained)} of {short_count(total)} parameters ({100 * trained / total:.3g} %)",
        "device": f"{device} {on}".strip(),
        "precision": "bf16 products, fp32 weights" if bf16 else "fp32",
        "threads": threads,
    }


def print_summary(rows: Mapping[str, str], *, quiet: bool = False) -> None:
    """Print the rows to standard error, as the progress is."""
    if quiet:
        return
    console = Console(file=sys.stderr)
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        for name, text in rows.items():
            table.add_row(Text(name, style="bold"), Text(text))  # as it is: a name may hold [/x]
        console.print(table)
        return
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}", file=sys.stderr, flush=True)


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Count the numbers in parameters."""
    # bitsandbytes keeps two 4-bit numbers in a byte.
    return sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in parameters)


def short_count(number: int) -> str:
    """Write a count with three significant digits and a unit, such as 2.13 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
