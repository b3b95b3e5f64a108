"""Score cache: the same response to the same prompt is scored once a run."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from rlhf_ppo.rewards.functions import StepRewards


class ScoreCache:
    """Answers of one reward function whose scores depend on their own row alone; the least recently used leave first.

    What cannot be written as JSON (a column of objects) is never kept: such rows are asked about again each time.
    """

    def __init__(self, size: int = 100_000) -> None:
        self.size = size
        self.lookups = self.hits = 0
        self._answers: OrderedDict[bytes, Any] = OrderedDict()

    @staticmethod
    def key(*row: Any) -> bytes | None:
        """What identifies a row: a digest of everything that the function sees of it."""
        try:
            return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()
        except (TypeError, ValueError):
            return None

    def state_dict(self) -> list[tuple[str, Any]]:
        """What a checkpoint keeps: keys in hexadecimal and answers, the least recently used first."""
        return [(key.hex(), _encoded(answer)) for key, answer in self._answers.items()]

    def load_state_dict(self, answers: Sequence[Sequence[Any]]) -> None:
        """Go on from :meth:`state_dict`."""
        self._answers = OrderedDict((bytes.fromhex(key), _decoded(answer)) for key, answer in answers)

    def to_ask(self, keys: Sequence[bytes | None]) -> list[int]:
        """Rows whose answer is not known: each key once, at its first row, and every row without a key."""
        seen: set[bytes] = set()
        rows: list[int] = []
        for i, key in enumerate(keys):
            if key is None or (key not in self._answers and key not in seen):
                rows.append(i)
            if key is not None:
                seen.add(key)
        self.lookups += len(keys)
        self.hits += len(keys) - len(rows)
        return rows

    def complete(self, keys: Sequence[bytes | None], asked: Sequence[int], answers: Sequence[Any]) -> list[Any]:
        """Answers to all rows from those to the rows that were asked; keeps them, but for None (perhaps next time)."""
        by_row = dict(zip(asked, answers, strict=True))
        fresh = {keys[i]: answer for i, answer in by_row.items()}
        whole = []
        for i, key in enumerate(keys):
            answer = by_row[i] if key is None else fresh[key] if key in fresh else self._answers[key]
            whole.append(answer)
            if key is not None and answer is not None:
                self._answers[key] = answer
                self._answers.move_to_end(key)
        # Only now, so that every row that was known when asked still is.
        while len(self._answers) > self.size:
            self._answers.popitem(last=False)
        return whole


def _encoded(answer: Any) -> Any:
    """An answer as JSON holds it; NumPy's numbers may stand in steps."""
    if isinstance(answer, StepRewards):
        return {"steps": [[*map(int, places), float(value)] for *places, value in answer.steps]}
    return answer


def _decoded(answer: Any) -> Any:
    if isinstance(answer, dict):
        return StepRewards([(*places, value) for *places, value in answer["steps"]])  # pyright: ignore
    return answer
