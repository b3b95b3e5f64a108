"""What reward functions log beside scores: metrics (``log_metric``), and columns of samples (``log_extra``)."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.files import plain_json

LOGGERS = ("log_metric", "log_extra")
"""Keyword arguments of reward functions that log."""

_OWN = (
    *("iteration", "prompt", "completion", "conversation", "score", "kl_nats", "reference_nats_per_token"),
    *("tokens", "finished", "turns", "rewards", "verdict"),
)
"""Columns that samples have anyway."""


@dataclass
class CallLog:
    """What one call of a reward function logs about some responses."""

    name: str
    """The function's."""
    rows: Sequence[int]
    """Numbers of the responses in the rollout."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number about this call's responses; of several with one name the mean counts.

        Raises:
            RewardError: not a name and a number.
        """
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
            value = value.item()
        if not _is_name(name) or not isinstance(value, (numbers.Real, np.bool_)):
            raise self._error(f"log_metric takes a name and a number, got {name!r} and {value!r:.80}")
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log a column of values, one per response of this call, all at once or piece by piece.

        Raises:
            RewardError: not a name and a list, or a column that samples have anyway.
        """
        if isinstance(values, (Tensor, np.ndarray)):
            values = values.tolist()
        if not _is_name(column) or not isinstance(values, (list, tuple)):
            raise self._error(
                f"log_extra takes a column's name and a list with one value per completion, got {column!r} and "
                f"{values!r:.80}"
            )
        if column in _OWN:
            raise self._error(f"log_extra({column!r}, ...): samples have a column of that name; choose another")
        self.columns.setdefault(column, []).extend(map(_plain, values))

    def require_whole(self) -> None:
        """Raise a RewardError unless each column has one value per response of this call."""
        for column, values in self.columns.items():
            if len(values) != len(self.rows):
                raise self._error(
                    f"log_extra({column!r}, ...) got {len(values)} values for {len(self.rows)} completions: log one "
                    "per completion"
                )

    def facts(self) -> dict[str, Any]:
        """Return all of it for JSON; :func:`rlhf_ppo.rewards.logs.CallLog` takes it back."""
        return {"name": self.name, "rows": list(self.rows), "metrics": self.metrics, "columns": self.columns}

    def _error(self, problem: str) -> RewardError:
        return RewardError(f"reward function {self.name!r}: {problem}")


@dataclass
class RewardLog:
    """What reward functions have logged about the responses of a rollout, in the calls of all processes."""

    calls: list[CallLog] = field(default_factory=list)

    def begin(self, name: str, rows: Sequence[int]) -> CallLog:
        """Return the log of a new call."""
        self.calls.append(CallLog(name, rows))
        return self.calls[-1]

    def gather(self, calls: Sequence[Mapping[str, Any]]) -> None:
        """Take the calls of all processes in place of this one's (:meth:`CallLog.facts`).

        Raises:
            RewardError: two functions log one column, or metrics of one name.
        """
        self.calls = [CallLog(**call) for call in calls]
        owners: dict[tuple[str, str], str] = {}
        for call in self.calls:
            for key in [*(("column", name) for name in call.columns), *(("metric", name) for name in call.metrics)]:
                if (other := owners.setdefault(key, call.name)) != call.name:
                    raise RewardError(
                        f"reward functions {other!r} and {call.name!r} both log the {key[0]} {key[1]!r}: rename one"
                    )

    def metrics(self) -> dict[str, float]:
        """Return the mean of each metric, over calls weighted by their responses.

        The mean over responses does not depend on how many calls and processes they were divided among.
        """
        sums: dict[str, tuple[float, int]] = {}
        for call in self.calls:
            for name, values in call.metrics.items():
                total, weight = sums.get(name, (0.0, 0))
                sums[name] = total + sum(values) / len(values) * len(call.rows), weight + len(call.rows)
        return {name: total / weight for name, (total, weight) in sums.items() if weight}

    def columns(self, count: int) -> dict[str, list[Any]]:
        """Return each column for ``count`` responses: None where a response was not asked about (a cached score)."""
        found: dict[str, list[Any]] = {}
        for call in self.calls:
            for column, values in call.columns.items():
                whole = found.setdefault(column, [None] * count)
                # A call that failed may have logged only some.
                for row, value in zip(call.rows, values, strict=False):
                    whole[row] = value
        return found


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name.strip()) and name.isprintable()


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back; what JSON cannot hold becomes text."""
    try:
        return plain_json(value)
    except ValueError:
        return str(value)
