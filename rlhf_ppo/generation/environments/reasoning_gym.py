"""reasoning-gym tasks as an environment, which lets the policy try again."""

from __future__ import annotations

from typing import Any

from rlhf_ppo.data.chat import Messages, Prompt
from rlhf_ppo.data.reasoning_gym import reasoning_gym_score, require_task


class ReasoningGym:
    """Ask a row's question and reward each answer with the task's own score; a perfect one ends the conversation.

    Rows are those of :func:`rlhf_ppo.data.reasoning_gym.reasoning_gym_rows`. With ``max_turns`` 1 there is one answer.
    """

    reply = "That is not right. Try again."
    """What a wrong answer gets; subclasses may say more."""

    def reset(self, row: dict[str, Any]) -> Prompt | None:
        """Begin with the row's prompt."""
        require_task(row)
        self._row = row
        return None

    def step(self, messages: Messages) -> tuple[str, float, bool]:
        """Score the answer."""
        score = reasoning_gym_score(str(messages[-1].get("content") or ""), self._row)
        return self.reply, score, score == 1
