"""Arguments of `rlhf-ppo doctor`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from rlhf_ppo.config.arguments.plan import PlanArgs
from rlhf_ppo.config.arguments.train import TrainArgs


@dataclass(frozen=True, kw_only=True)
class DoctorArgs(TrainArgs):
    """Examine a run before it starts: its files, its reward and its memory; takes the flags and files of `train`."""

    FIRST: ClassVar[tuple[str, ...]] = (
        *("model", "reward", "dataset", "output_dir", "card", "probe_prompts", "probe_responses", "json"),
    )
    """Settings that a beginner needs first, as help and docs list them."""

    probe_prompts: int = 8
    """Prompts that the untrained policy answers, to see what the reward says."""
    probe_responses: int = 4
    """Responses to each of them; what differs between them is what PPO learns from."""
    card: str | None = None
    """Card to plan memory and time for, as in `plan`; None: this machine's."""
    gpus: int | None = None
    """Processes to plan for, one for each GPU. None: one."""
    nodes: int = 1
    """Machines that they are spread over evenly."""
    json: bool = False
    """Print the findings as JSON instead of text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "probe_prompts", "gpus", "nodes")
        self._require_at_least(2, "probe_responses")

    def as_plan(self, prompt_tokens: int, response_tokens: int) -> PlanArgs:
        """Return the arguments of `plan` for the same run; lengths in tokens."""
        same = {field.name: getattr(self, field.name) for field in fields(TrainArgs)}
        where = {"card": self.card, "gpus": self.gpus, "nodes": self.nodes}
        lengths = {"prompt_tokens": max(1, prompt_tokens), "response_tokens": max(1, response_tokens)}
        return PlanArgs(**{**same, **where, **lengths})
