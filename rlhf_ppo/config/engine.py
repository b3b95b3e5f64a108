"""Settings of a vLLM server that samples in the run's place (generation=vllm)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_ppo.core.validation import Settings


@dataclass(frozen=True, kw_only=True)
class VLLMSettings(Settings):
    """vLLM: a server that samples, with generation=vllm."""

    vllm_url: str | None = None
    """Address of the server, such as http://127.0.0.1:8000 (its token comes from the environment: RLHF_PPO_VLLM_TOKEN).
    None: the run ends at once, with the line that starts a server for its model."""
    vllm_timeout_s: float = 600.0
    """Timeout in seconds of one request, a whole response included."""
    vllm_retries: int = 3
    """Retries after a 5xx answer, a timeout or a failed connection."""
    rollouts_ahead: int = 0
    """1: sample the next rollout while the update on this one runs; its policy is then one update old, which importance
    weights correct. 0: one after the other, bit for bit the same each time."""
    max_sampler_gap: float | None = None
    """Stop, with a checkpoint, when the server's log-probs are further from ours than this many nats per token, in the
    mean over a rollout. None: 0.1, or 0.5 where rollouts_ahead compares two policies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("vllm_timeout_s", "max_sampler_gap")
        self._require_at_least(0, "vllm_retries", "rollouts_ahead")
        if self.rollouts_ahead > 1:
            raise ValueError(
                f"rollouts_ahead={self.rollouts_ahead} is more than the one rollout that can be sampled during an "
                "update: set it to 0 or 1"
            )

    @property
    def sampler_gap_bound(self) -> float:
        """Largest mean |difference| of the server's log-probs and ours, in nats per token."""
        return self.max_sampler_gap or (0.5 if self.rollouts_ahead else 0.1)


def in_process(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run changes to sample and learn alike without its vLLM server, which others may use; {} without."""
    if settings.get("generation") != "vllm":
        return {}
    weighted = settings.get("importance_weights") == "auto" and settings.get("objective") != "dis"
    return {
        "generation": "auto",
        "recompute_logprobs": True,
        **({"importance_weights": "token"} if weighted else {}),
        **{field.name: field.default for field in dataclasses.fields(VLLMSettings)},
    }
