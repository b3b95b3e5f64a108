"""Arguments of `rlhf-ppo plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlhf_ppo.config.arguments.train import TrainArgs


@dataclass(frozen=True, kw_only=True)
class PlanArgs(TrainArgs):
    """Show a run's memory and time on paper, without loading weights; takes the flags and files of `train`."""

    FIRST: ClassVar[tuple[str, ...]] = (
        *("model", "gpus", "nodes", "card", "links", "sharding", "prompt_tokens", "response_tokens", "explain", "json"),
    )
    """Settings that a beginner needs first, as help and docs list them."""

    SCORED: ClassVar[bool] = False

    reward: tuple[str, ...] = ()
    """Reward models count, by folder or hub id; functions and servers cost a plan nothing."""
    dataset: tuple[str, ...] = ("prompts",)
    """Not read: prompt_tokens says how long prompts are."""
    output_dir: str = "plan"
    """Not written."""
    gpus: int | None = None
    """Processes in all, one for each GPU. None: one."""
    nodes: int = 1
    """Machines that the processes are spread over evenly."""
    card: str | None = None
    """GPU of each process: A100-40, A100-80, H100, H200, L40S, RTX4090 or RTX3090; or cpu. None: this machine's, or
    A100-80 where gpus are asked for and this machine has none."""
    links: float = 400.0
    """Bandwidth of a machine's network in Gbit/s, for several nodes."""
    prompt_tokens: int = 256
    """Length of prompts."""
    response_tokens: int | None = None
    """Mean length of responses. None: max_new_tokens."""
    explain: bool = False
    """Show the arithmetic of every number."""
    json: bool = False
    """Print the numbers as JSON instead of words and tables."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "gpus", "nodes", "prompt_tokens", "response_tokens")
        self._require_positive("links")
        if self.response_tokens is not None and self.response_tokens > self.max_new_tokens:
            raise ValueError(
                f"response_tokens={self.response_tokens} is above max_new_tokens={self.max_new_tokens}: lower the "
                "first or raise the second"
            )
        if self.processes % self.nodes:
            raise ValueError(
                f"gpus={self.processes} processes do not divide into nodes={self.nodes}: gpus counts those of all nodes"
            )
        if self.sharding == "hybrid" and self.nodes == 1:
            raise ValueError(
                "sharding='hybrid' repeats the shares on every machine, but nodes=1: set sharding='full', or nodes"
            )
        if self.quantization != "none" and self.lora_rank is None:
            raise ValueError(
                f"quantization={self.quantization!r} freezes the policy's weights, so an adapter must be trained: set "
                "lora_rank"
            )

    @property
    def processes(self) -> int:
        """Processes in all."""
        return self.gpus or 1
