"""reasoning-gym's own scores of answers to its tasks, as a reward function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ppo.data.chat import Completion
from rlhf_ppo.data.reasoning_gym import reasoning_gym_score


def reasoning_gym(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    question: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    **columns: Any,
) -> list[float]:
    """Score answers to rows of :func:`rlhf_ppo.data.reasoning_gym.reasoning_gym_rows`, from 0 to 1."""
    rows = zip(question, answer, metadata, strict=True)
    return [
        reasoning_gym_score(_last_said(said), {"question": asked, "answer": right, "metadata": facts})
        for said, (asked, right, facts) in zip(completions, rows, strict=True)
    ]


def _last_said(completion: Completion) -> str:
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")
