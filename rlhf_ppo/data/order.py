"""Which prompts come next: in reshuffled passes over the data set, or the easiest first."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_ppo.config.prompt_settings import PromptSettings
from rlhf_ppo.data.rows import Rows, require_column


@dataclass(frozen=True)
class PromptOrder:
    """Rows of a data set for each iteration; they depend on the seed and on numbers alone, never on what was drawn."""

    count: int
    """Rows of the data set."""
    seed: int
    easiest: Sequence[int] | None = None
    """All rows, the easiest first; None: no curriculum."""
    start: float = 1.0
    """Share of them, from the easiest, that the first iteration draws from."""
    growing: int = 0
    """Iterations over which that share grows to 1, in equal steps."""

    def window(self, iteration: int) -> int:
        """Return how many of the easiest rows an iteration (from 0) draws from."""
        if iteration >= self.growing:
            return self.count
        share = self.start + (1 - self.start) * iteration / self.growing
        return math.ceil(round(self.count * share, 6))  # not one more for a rounding error

    def rows(self, iteration: int, size: int, count: int, *, after: int = 0, extra: int = 0) -> list[int]:
        """Return the next ``count`` rows of an iteration.

        While the window grows, each iteration has an order of its own over it. Then passes over all rows begin, each in
        a new order, which go on from iteration to iteration.

        Args:
            iteration: from 0.
            size: rows that every iteration takes.
            count: how many to return.
            after: rows that this iteration has taken already.
            extra: rows that earlier iterations took beyond ``size`` each, of those after the window has grown.
        """
        if iteration < self.growing and self.easiest is not None:
            window = self.easiest[: self.window(iteration)]
            # Seeds of iterations lie as far apart as those of runs.
            own = (self.seed * 1_000_003 + iteration) * 1_000_003 % 2**63
            return [window[i] for i in _passes(len(window), own, after, count)]
        first = (iteration - self.growing) * size + extra + after
        return _passes(self.count, self.seed * 1_000_003, first, count)


def _passes(rows: int, seed: int, first: int, count: int) -> list[int]:
    """Return rows ``first`` to ``first + count`` of endless passes over ``rows`` rows, each in a new random order."""
    order: dict[int, list[int]] = {}
    picked: list[int] = []
    for k in range(first, first + count):
        epoch, position = divmod(k, rows)
        if epoch not in order:
            generator = torch.Generator().manual_seed(seed + epoch)
            order[epoch] = torch.randperm(rows, generator=generator).tolist()
        picked.append(order[epoch][position])
    return picked


def prompt_order(rows: Rows, args: PromptSettings, *, seed: int, rollouts: int) -> PromptOrder:
    """Return the order of a training set's rows, under ``curriculum_column`` by their difficulty.

    Args:
        rows: the data set.
        args: the curriculum.
        seed: of the run.
        rollouts: of the whole run.
    Raises:
        ValueError: no such column, or a difficulty that is not a finite number; names the row.
    """
    column = args.curriculum_column
    if column is None:
        return PromptOrder(len(rows), seed)
    require_column(rows, column)
    difficulties = rows[column]
    for value, where in zip(difficulties, rows.names, strict=True):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(
                f"{where}: the column {column!r} holds {value!r:.80}, but curriculum_column needs a number that says "
                "how difficult the prompt is: correct the row, or name another column"
            )
    easiest = sorted(range(len(rows)), key=lambda i: difficulties[i])
    growing = math.ceil(args.curriculum_span * rollouts)
    return PromptOrder(len(rows), seed, easiest, args.curriculum_start, growing)
