"""Score cache: score each distinct pair of prompt and response once per run."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ppo.rewards.functions import RewardFunction, StepRewards, accepts


class ScoreCache:
    """Scores of one reward function that scores each row by itself; the least recently used are evicted first.

    Rows that JSON cannot hold (a column of objects) are never cached: they are scored again each time.
    """

    def __init__(self, size: int = 100_000) -> None:
        self.size = size
        self.lookups = self.hits = 0
        self._answers: OrderedDict[bytes, Any] = OrderedDict()

    @staticmethod
    def key(*row: Any) -> bytes | None:
        """Hash everything that the function sees of a row; None if JSON cannot hold it."""
        try:
            return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()
        except (TypeError, ValueError):
            return None

    def state_dict(self) -> list[tuple[str, Any]]:
        """Return keys in hexadecimal and scores for a checkpoint, the least recently used first."""
        return [(key.hex(), encoded_score(answer)) for key, answer in self._answers.items()]

    def load_state_dict(self, answers: Sequence[Sequence[Any]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._answers = OrderedDict((bytes.fromhex(key), decoded_score(answer)) for key, answer in answers)

    def to_ask(self, keys: Sequence[bytes | None]) -> list[int]:
        """Return the rows to score: each unknown key once, at its first row, and every row without a key."""
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
        """Return all rows' scores, given those of the rows ``asked``; cache these, except None (asked again)."""
        by_row = dict(zip(asked, answers, strict=True))
        fresh = {keys[i]: answer for i, answer in by_row.items()}
        whole = []
        for i, key in enumerate(keys):
            answer = by_row[i] if key is None else fresh[key] if key in fresh else self._answers[key]
            whole.append(answer)
            if key is not None and answer is not None:
                self._answers[key] = answer
                self._answers.move_to_end(key)
        # Evict last, so that every row that was cached in to_ask still is.
        while len(self._answers) > self.size:
            self._answers.popitem(last=False)
        return whole


def encoded_score(answer: Any) -> Any:
    """Convert a reward function's answer for JSON; steps may hold NumPy numbers."""
    if isinstance(answer, StepRewards):
        return {"steps": [[*map(int, places), float(value)] for *places, value in answer.steps]}
    return answer


def decoded_score(answer: Any) -> Any:
    """Undo :func:`encoded_score`."""
    if isinstance(answer, dict):
        return StepRewards([(*places, value) for *places, value in answer["steps"]])  # pyright: ignore
    return answer


def make_caches(rewards: Mapping[str, tuple[RewardFunction, float]]) -> dict[str, ScoreCache]:
    """Make a cache for each reward function that scores text alone (``cache_rewards``).

    Raises:
        ValueError: there is none.
    """
    # A function that receives conversations may know more about them than their text, such as an environment's state.
    names = [
        name
        for name, (f, _) in rewards.items()
        if not accepts(f, "conversations") and not accepts(f, "completion_turns")
    ]
    if not names:
        raise ValueError(
            f"cache_rewards=True has no effect: all of the rewards {list(rewards)} receive conversations or "
            "completion_turns, about which they may know more than the text. Leave it out"
        )
    return {name: ScoreCache() for name in names}
