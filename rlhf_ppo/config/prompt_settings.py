"""Settings of the prompts: which of them are trained on, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_ppo.core.validation import Settings, refuse_unread


@dataclass(frozen=True, kw_only=True)
class PromptSettings(Settings):
    """Prompts: which of them, and in which order."""

    zero_signal_prompts: Literal["keep", "drop", "resample"] = "keep"
    """What to do with prompts whose num_generations responses all score alike: train on them (keep), leave them out of
    the update (drop), or replace them by further prompts (resample)."""
    zero_signal_rounds: int = 4
    """Under zero_signal_prompts="resample": at most this many rounds of further prompts per rollout; what is then still
    missing is left out of the update."""
    curriculum_column: str | None = None
    """Column of the training data with a number that says how difficult the prompt is: easy prompts come first. None:
    reshuffled passes over all prompts."""
    curriculum_start: float = 0.25
    """Share of the prompts, from the easiest, that the first rollout draws from."""
    curriculum_span: float = 0.5
    """Share of the run's rollouts over which that share grows to all prompts, in equal steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "zero_signal_rounds")
        if self.zero_signal_prompts != "resample":
            how = f"zero_signal_prompts={self.zero_signal_prompts!r} draws no further prompts"
            refuse_unread(self, how, "zero_signal_rounds")
        share = "above 0 and at most 1"
        self._require(share, lambda value: 0 < value <= 1, "curriculum_start", "curriculum_span")
        if self.curriculum_column is None:
            refuse_unread(self, "curriculum_column=None orders no prompts", "curriculum_start", "curriculum_span")
