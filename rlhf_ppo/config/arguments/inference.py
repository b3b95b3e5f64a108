"""Arguments of the commands that sample from a trained model: evaluate and generate."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ppo.config.arguments.data import PromptArgs
from rlhf_ppo.config.json_mapping import JsonMapping
from rlhf_ppo.config.run_groups import Precision, ProcessSettings
from rlhf_ppo.core.validation import is_changed


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(PromptArgs, ProcessSettings):
    """Measure a model on prompts: reward, KL, length, diversity, and its win rate against its reference."""

    model: str
    """Folder of a run, of a model or of an adapter, or a hub id."""
    reward: tuple[str, ...] = ()
    """One or more rewards: file.py:function, module:function, a sequence-classification model's folder or hub id, or a
    reward server's http(s) address (its token comes from the environment: RLHF_PPO_REWARD_TOKEN). None is needed
    beside an environment, which rewards turns."""
    reward_chat_template: str | None = None
    """Chat template for reward models: see train. None: as in the run, if one of the models above scored it."""
    reward_max_length: int | None = None
    """Maximum tokens that reward models read. None: as in the run, if one of the models above scored it."""
    dataset: tuple[str, ...]
    """Prompts that were not trained on: one or more hub ids, folders, or csv, jsonl or parquet files (also .gz)."""
    chat_template: str | None = None
    """Jinja chat template for both models' tokenizers, a file or the text itself. None: each one's own, or the run's,
    if it was given one."""
    chat_template_kwargs: JsonMapping = None
    """Variables of the chat template, as a mapping: {"enable_thinking": false}. A row's own column
    chat_template_kwargs goes first. None: as in the run."""
    num_prompts: int | None = None
    """Number of prompts to use, from the first; None: all."""
    ref_model: str | None = None
    """Reference model for the KL; None: what the run in the model's folder started from."""
    against: str | None = None
    """Model to compare with; None: the reference."""
    judge: str | None = None
    """Reward that decides who wins, best one held out from training; None: the sum of the rewards above."""
    drop_nonfinite_scores: bool = False
    """Treat a NaN or infinite score as unscorable instead of stopping."""
    output_dir: str = "runs/evaluation"
    """Folder for evaluation.json and evaluation_samples.jsonl."""
    max_new_tokens: int | None = None
    """Maximum response length in tokens; None: as in the run (48 if the folder holds no run)."""
    temperature: float | None = None
    """Divides the logits; None: as in the run (1 if the folder holds no run)."""
    respond: str | None = None
    """What answers the model's turns: file.py:function or module:function. None: as in the run."""
    tools: tuple[str, ...] | None = None
    """Tools that the model may call: see train. None: as in the run."""
    environment: str | None = None
    """What answers and rewards the model's turns instead: file.py:Class or module:Class, as for train. None: as in the
    run."""
    max_turns: int | None = None
    """Maximum number of the model's turns; None: as in the run (1 if the folder holds no run)."""
    batch_size: int = 32
    """Responses sampled at the same time."""
    seed: int = 0
    """Random seed of the draws, the same for both models."""
    device: str | None = None
    """cuda, mps or cpu; None: the first of these that is available."""
    precision: Precision = "auto"
    """Number format of matrix products: bf16, fp32, or auto (bf16 where the device computes it faster)."""
    num_threads: int | None = None
    """CPU threads; None: 1 for models below ten million parameters, else all CPUs available."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "num_prompts", "batch_size", "max_turns", "num_threads")


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(ProcessSettings):
    """Sample completions of prompts from a model, or chat with it."""

    model: str
    """Folder of a model or adapter, hub id, or "embedded"."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    dataset: str | None = None
    """Data set with the prompts instead: a hub id, a folder, or a csv, jsonl or parquet file (also .gz)."""
    split: str = "train"
    """Split of the data set."""
    prompt_column: str = "prompt"
    """Column with the prompts, text or chat messages."""
    output: str | None = None
    """With dataset: jsonl file to write, one row per completion, with the data set's other columns."""
    chat_template: str | None = None
    """Jinja chat template for the tokenizer, a file or the text itself; None: the tokenizer's own."""
    chat_template_kwargs: JsonMapping = None
    """Variables of the chat template, as a mapping: {"enable_thinking": false}. A row's own column
    chat_template_kwargs goes first. None: as in the run in the model's folder."""
    chat: bool = False
    """Chat with the model: lines from the keyboard or a pipe, until end of input or /exit."""
    explain: bool = False
    """Show the completions token by token, with the reward, KL, value and advantage of each token: model is a run's
    folder, whose own settings, rewards and reference count (see the command explain)."""
    html: str | None = None
    """With explain: also write the completions into this HTML file, each token coloured by the number you choose."""
    num_samples: int = 1
    """Completions per prompt."""
    batch_size: int = 32
    """Completions sampled at once."""
    max_new_tokens: int = 48
    """Maximum completion length in tokens."""
    stop_strings: tuple[str, ...] | None = None
    """Strings that end a completion and are cut from it; None: those of the run in the model's folder."""
    temperature: float = 1.0
    """Divides the logits: below 1 is more predictable, above 1 more varied."""
    seed: int = 0
    """Random seed of the draws."""
    device: str | None = None
    """cuda, mps or cpu; None: the first of these that is available."""
    num_threads: int | None = None
    """CPU threads; None: 1 for models below ten million parameters, else all CPUs available."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "num_samples", "max_new_tokens", "batch_size", "num_threads")
        self._require_positive("temperature")
        given = [name for name in ("prompt", "dataset", "chat") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of prompt, dataset and chat, got {' and '.join(given) or 'none'}")
        if (self.dataset is None) != (self.output is None):
            raise ValueError(f"dataset and output go together, got dataset={self.dataset!r} and output={self.output!r}")
        if self.chat and self.num_samples > 1:
            raise ValueError(f"chat gives one reply per turn, got num_samples={self.num_samples}")
        for name, unread in (
            ("split", self.dataset is None),
            ("prompt_column", self.dataset is None),
            ("batch_size", self.chat),
        ):
            if unread and is_changed(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect on {given[0]}: leave it out")
        if self.html is not None and not self.explain:
            raise ValueError(f"html={self.html!r} shows what explain computes: add explain, or leave html out")
        if self.explain and not self.prompt:
            raise ValueError(f"explain shows completions of prompt, and {given[0]} is given: leave one of them out")
        for name in ("num_samples", "batch_size", "max_new_tokens", "stop_strings", "temperature", "chat_template"):
            if self.explain and is_changed(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect under explain, which samples as the run did: leave "
                    "it out"
                )
