"""Arguments of `rlhf-ppo verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlhf_ppo.config.arguments.train import TrainArgs


@dataclass(frozen=True, kw_only=True)
class VerifyArgs(TrainArgs):
    """Check on your model, data, reward and settings that training is computed right; takes the flags of `train`."""

    FIRST: ClassVar[tuple[str, ...]] = (
        "model",
        "reward",
        "dataset",
        "num_responses",
        "response_tokens",
        "only",
        "json",
    )
    """Settings that a beginner needs first, as help and docs list them."""

    output_dir: str = "verify"
    """Not written: what the checks save goes into a temporary folder."""
    num_responses: int = 16
    """Responses to check with; rounded up to whole minibatches and groups, at most rollout_batch_size."""
    response_tokens: int = 64
    """Maximum response length in tokens; at most max_new_tokens."""
    only: tuple[str, ...] = ()
    """Names of the checks to run. None given: all of them."""
    json: bool = False
    """Print the report as JSON instead of text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "num_responses", "response_tokens")
        if self.replay is not None:
            raise ValueError(
                f"replay={self.replay!r} trains on rollouts that are recorded already, but `verify` samples its own: "
                "drop it"
            )
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                f"resume_from_checkpoint={self.resume_from_checkpoint!r}, but `verify` starts from model: drop it; to "
                "verify a trained policy, name its folder as model"
            )
