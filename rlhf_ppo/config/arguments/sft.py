"""SFTArgs: what `rlhf-ppo sft` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_ppo.config.arguments.data import DataArgs
from rlhf_ppo.config.json_mapping import JsonMapping
from rlhf_ppo.config.run_groups import ProcessSettings, ReportSettings


@dataclass(frozen=True, kw_only=True)
class SFTArgs(DataArgs, ProcessSettings, ReportSettings):
    """Fine-tune a language model on text or on prompts with completions, or train a new one."""

    dataset: tuple[str, ...]
    """Training text: one or more hub ids, folders, or csv, jsonl or parquet files (also .gz)."""
    output_dir: str
    """Folder for the trained model and its tokenizer, in transformers' own format, and metrics.jsonl."""
    model: str | None = None
    """Model to continue from: a hub id or folder, or "embedded" (the small GPT-2 in the package)."""
    architecture: str | None = None
    """A transformers config.json: train a new model of this shape, with a byte-level BPE of its own."""
    text_column: str = "text"
    """Column with the text, or with whole conversations, of which the assistant's last message is learned."""
    prompt_column: str | None = None
    """Column with prompts, text or chat messages, which are masked from the loss; used with completion_column."""
    completion_column: str | None = None
    """Column with what is learned after prompt_column: text, or the assistant's message; "chosen" of preferences."""
    chat_template: str | None = None
    """Jinja chat template for the tokenizer, a file or the text itself; saved with the model. None: the tokenizer's
    own."""
    chat_template_kwargs: JsonMapping = None
    """Variables of the chat template: {"enable_thinking": false}; a row's own column of this name goes first."""
    max_length: int = 512
    """Maximum example length in tokens, at most the model's context; longer ones are truncated and get no end-of-text
    token."""
    eval_fraction: float = 0.02
    """Share of the rows held out for the perplexity."""
    num_epochs: float = 1.0
    """Passes over the training rows."""
    batch_size: int = 32
    """Rows per optimizer step."""
    learning_rate: float = 5e-5
    """Peak learning rate, reached after the warm-up, then cosine to zero."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up; in a shorter run, a tenth of its steps."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the saved weights; training itself runs in float32."""
    seed: int = 0
    """Random seed of the initialization, the hold-out split and the order of rows."""
    num_threads: int | None = None
    """CPU threads; None: 1 for models below ten million parameters, else all CPUs available."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("between 0 and 1", lambda value: 0 < value < 1, "eval_fraction")
        self._require_at_least(1, "max_length", "batch_size", "num_threads")
        self._require_at_least(0, "learning_rate", "warmup_steps", "weight_decay")
        self._require_positive("num_epochs")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError(
                "prompt_column and completion_column go together, got "
                f"prompt_column={self.prompt_column!r} and completion_column={self.completion_column!r}"
            )
        if (self.model is None) == (self.architecture is None):
            raise ValueError(
                "give exactly one of model (continue from it) and architecture (train a new one), "
                f"got model={self.model!r} and architecture={self.architecture!r}"
            )
        if self.completion_column is not None and self.text_column != "text":
            raise ValueError(
                f"text_column={self.text_column!r} has no effect beside completion_column={self.completion_column!r}: "
                "drop one of them"
            )
