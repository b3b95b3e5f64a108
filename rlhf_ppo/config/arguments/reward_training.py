"""RewardTrainingArgs: what `rlhf-ppo reward` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_ppo.config.arguments.data import DataArgs
from rlhf_ppo.config.json_mapping import JsonMapping
from rlhf_ppo.config.run_groups import Precision, ProcessSettings, ReportSettings


@dataclass(frozen=True, kw_only=True)
class RewardTrainingArgs(DataArgs, ProcessSettings, ReportSettings):
    """Train a reward model on pairs of a chosen and a rejected answer (Bradley-Terry)."""

    dataset: tuple[str, ...]
    """Preferences: one or more hub ids, folders, or csv, jsonl or parquet files (also .gz)."""
    output_dir: str
    """Folder for the reward model, metrics.jsonl, reward_metrics.json and calibration.png."""
    model: str = "embedded"
    """Model to start from: a causal language model's or classifier's folder or hub id, or "embedded"."""
    prompt_column: str | None = "prompt"
    """Column with the prompts, text or chat messages; None: the answers are whole texts or whole conversations."""
    chosen_column: str = "chosen"
    """Column with the better answers, text or chat messages."""
    rejected_column: str = "rejected"
    """Column with the worse answers."""
    margin_column: str | None = None
    """Column with a margin per row, by which the chosen score should exceed the rejected one; None: no margins."""
    chat_template: str | None = None
    """Jinja chat template for the tokenizer, a file or the text itself; saved with the model. None: the tokenizer's
    own."""
    chat_template_kwargs: JsonMapping = None
    """Variables of the chat template: {"enable_thinking": false}; a row's own column of this name goes first."""
    max_length: int = 512
    """Maximum text length in tokens, at most the model's context; longer texts (counted) keep their end."""
    eval_fraction: float = 0.1
    """Share of the prompts held out, with all of their pairs, for accuracy and calibration."""
    num_epochs: int = 1
    """Passes over the training pairs; reward models overfit quickly."""
    batch_size: int = 16
    """Pairs per optimizer step."""
    learning_rate: float = 5e-5
    """Peak learning rate, reached after the warm-up, then cosine to zero."""
    warmup_steps: int = 10
    """Optimizer steps of linear warm-up; in a shorter run, a tenth of its steps."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Clip gradients to this global norm."""
    centering: float = 0.0
    """Coefficient of (chosen + rejected score)^2 in the loss, which keeps scores around 0; 0.01 is usual."""
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank and the score head instead of all weights; only the adapter is saved."""
    seed: int = 0
    """Random seed of the score head, the hold-out split and the order of pairs."""
    device: str | None = None
    """cuda, mps or cpu; None: the first of these that is available."""
    precision: Precision = "auto"
    """Number format of matrix products: bf16, fp32, or auto (bf16 where the device computes it faster)."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the saved weights."""
    num_threads: int | None = None
    """CPU threads; None: 1 for models below ten million parameters, else all CPUs available."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("between 0 and 1", lambda value: 0 < value < 1, "eval_fraction")
        self._require_at_least(1, "max_length", "num_epochs", "batch_size", "num_threads", "lora_rank")
        self._require_at_least(0, "centering", "weight_decay", "warmup_steps", "learning_rate")
        self._require_positive("max_grad_norm")
