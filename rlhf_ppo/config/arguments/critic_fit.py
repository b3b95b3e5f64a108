"""Arguments of `rlhf-ppo critic fit` and `rlhf-ppo critic report`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from rlhf_ppo.config.run_groups import Precision, ProcessSettings
from rlhf_ppo.core.validation import refuse_unread


@dataclass(frozen=True, kw_only=True)
class RecordedArgs(ProcessSettings):
    """Recorded rollouts: what their returns are, and how models read them."""

    gamma: float | None = None
    """Discount per token of the returns. None: the recording's."""
    kl_coef: float | None = None
    """Coefficient of the KL penalty in the rewards. None: the recording's (where it started, if it adapted)."""
    microbatch_tokens: int | None = None
    """Maximum tokens, prompts included, per forward pass. None: 1024 on CPU, 16384 on a GPU."""
    seed: int = 0
    """Random seed of splits, orders and new weights."""
    device: str | None = None
    """cuda, mps or cpu; None: the first of these that is available."""
    precision: Precision = "auto"
    """Number format of matrix products: bf16, fp32, or auto (bf16 where the device computes it faster)."""
    num_threads: int | None = None
    """CPU threads; None: 1 for models below ten million parameters, else all CPUs available."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_between(0, 1, "gamma")
        self._require_at_least(0, "kl_coef")
        self._require_positive("microbatch_tokens", "num_threads")


@dataclass(frozen=True, kw_only=True)
class CriticFitArgs(RecordedArgs):
    """Train a critic offline on recorded rollouts, for runs to start from."""

    rollouts: tyro.conf.Positional[tuple[str, ...]]
    """One or more recordings: folders of runs that recorded their rollouts."""
    output_dir: str
    """Folder for the critic: value_head_from of a run (and value_model, under kind="separate")."""
    kind: Literal["shared", "separate", "adapter"] = "shared"
    """shared: a value head on the policy's frozen trunk, solved exactly in one pass; separate: a whole model
    (value_model); adapter: a LoRA adapter on the policy's base (lora_rank)."""
    model: str | None = None
    """The policy that runs will start from: a folder or hub id. None: the recording's."""
    value_model: str | None = None
    """Trunk that a separate critic starts from: a folder or hub id, a reward model's too."""
    value_head_from: str | None = None
    """Folder or hub id of the value head that the critic starts from, such as the reward model of value_model. None:
    start at the mean return."""
    lora_rank: int | None = None
    """Rank of the critic's adapter: that of the run's."""
    lora_alpha: int | None = None
    """Scale the adapter by lora_alpha / lora_rank. None: twice the rank."""
    lora_target_modules: tuple[str, ...] | None = None
    """Names of the layers that get the adapter, or "all-linear". None: PEFT's choice for the architecture."""
    eval_fraction: float = 0.2
    """Share of the prompts (or rollouts) held out, with all of their responses."""
    split_by: Literal["prompt", "rollout"] = "prompt"
    """What is held out: prompts, or whole rollouts, where prompts are few and repeat."""
    num_epochs: int = 10
    """Most passes over the training responses."""
    patience: int = 2
    """Stop after this many passes without a better held-out explained variance; the best pass is kept."""
    batch_size: int = 32
    """Responses per optimizer step."""
    learning_rate: float | None = None
    """Learning rate of AdamW. None: the one that a run chooses for a critic of this size."""
    max_grad_norm: float = 1.0
    """Clip gradients to this global norm."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rollouts:
            raise ValueError("rollouts is empty: name at least one recording, the folder of a run with rollouts")
        self._require("between 0 and 1", lambda value: 0 < value < 1, "eval_fraction")
        self._require_at_least(1, "num_epochs", "patience", "batch_size", "lora_rank", "lora_alpha")
        self._require_positive("learning_rate", "max_grad_norm")
        kind = f"kind={self.kind!r}"
        if self.kind == "shared":
            solved = f"{kind} is solved exactly, without optimizer steps"
            refuse_unread(self, solved, "num_epochs", "patience", "batch_size", "learning_rate", "max_grad_norm")
            refuse_unread(self, f"{kind} fits a new head", "value_head_from")
        if self.kind != "separate":
            refuse_unread(self, f"{kind} stands on the policy's own model", "value_model")
        if self.kind != "adapter":
            refuse_unread(self, f"{kind} has no adapter", "lora_rank", "lora_alpha", "lora_target_modules")
        if self.kind == "separate" and self.value_model is None:
            raise ValueError("kind='separate' needs a value_model to start from: name its folder or hub id")
        if self.kind == "adapter" and self.lora_rank is None:
            raise ValueError("kind='adapter' needs lora_rank, the one that the run will have")


@dataclass(frozen=True, kw_only=True)
class CriticReportArgs(RecordedArgs):
    """Report what a critic's values are worth, and which lambda they support."""

    rollouts: tyro.conf.Positional[str]
    """Folder of a run that recorded its rollouts, or of the recording."""
    critic: str | None = None
    """Folder of a fitted critic to read the recording with. None: the values that were recorded at sampling."""
    last: int | None = None
    """Use only the newest rollouts, this many of them. None: all."""
    json: bool = False
    """Print the numbers as JSON instead of words and tables."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "last")
        if self.critic is None:
            refuse_unread(self, "no model reads the recording: critic is None", "microbatch_tokens", "device")
