"""Supervised fine-tuning: teach a model to write like a text data set, from a checkpoint or from scratch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from rlhf_ppo.data import load_rows, require_column
from rlhf_ppo.models import context_length, load_policy, load_tokenizer, resolve_model

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class SFTArgs:
    """Teach a language model to write like a text data set: continue from a model, or train a new one."""

    dataset: str
    """Training text: a hub id, a folder, or a csv, jsonl or parquet file (also .gz)."""
    output_dir: str
    """Folder for the trained model and its tokenizer, in transformers' own format."""
    model: str | None = None
    """Model to continue from: a hub id or folder, or "embedded" (the small GPT-2 in the package)."""
    architecture: str | None = None
    """A transformers config.json: train a new model of this shape, with a byte-level BPE of its own."""
    split: str = "train"
    """Split of the data set."""
    text_column: str = "text"
    """Column that holds the text."""
    max_length: int = 512
    """Longest example in tokens, at most the model's context; longer ones are cut and get no end-of-text token."""
    eval_fraction: float = 0.02
    """Share of the rows held out for the perplexity."""
    num_epochs: float = 1.0
    """Passes over the training rows."""
    batch_size: int = 32
    """Rows per optimizer step."""
    learning_rate: float = 5e-5
    """Peak learning rate, reached after the warm-up, then cosine to zero."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the saved weights; training itself runs in float32."""
    seed: int = 0
    """Seed of the initialisation, the hold-out split and the order of rows."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.architecture is None):
            raise ValueError(
                "give exactly one of model (continue from it) and architecture (train a new one), "
                f"got model={self.model!r} and architecture={self.architecture!r}"
            )
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie between 0 and 1, got {self.eval_fraction}")


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, learned from ``texts``; end of text is its only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _load(args: SFTArgs, texts: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if args.model is not None:
        name = resolve_model(args.model)
        return load_policy(name), load_tokenizer(name)
    config = AutoConfig.from_pretrained(str(args.architecture), trust_remote_code=False)
    tokenizer = train_tokenizer(texts, config.vocab_size, config.max_position_embeddings)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    return AutoModelForCausalLM.from_config(config), tokenizer


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right by length, never by id: an end-of-text token that ends a row stays a target."""

    def pad(name: str, value: int) -> torch.Tensor:
        columns = [torch.tensor(row[name]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    mask = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
    return {
        "input_ids": pad("input_ids", 0),
        "labels": pad("labels", -100),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
    }


def hold_out(rows: Dataset, args: SFTArgs) -> DatasetDict:
    """The rows in two parts, ``train`` and ``test``, by ``eval_fraction`` and ``seed``."""
    return rows.train_test_split(max(1, round(args.eval_fraction * len(rows))), seed=args.seed)


def sft(args: SFTArgs) -> dict[str, float]:
    """Train, save to ``args.output_dir``, and return the held-out loss (nats per token) and perplexity."""
    torch.manual_seed(args.seed)
    rows = load_rows(args.dataset, args.split)
    require_column(rows, args.text_column)
    if len(rows) < 2:
        raise ValueError(f"{args.dataset} has {len(rows)} row; at least 2 are needed, one of them held out")
    rows = hold_out(rows, args)
    model, tokenizer = _load(args, rows["train"][args.text_column])
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {args.model} names no end-of-text token, which ends every row: give it one")
    longest = min(args.max_length, context_length(model.config) or args.max_length)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(batch[args.text_column])["input_ids"]]
        ids = [row[:longest] for row in ids]
        return {"input_ids": ids, "labels": ids, "length": [len(row) for row in ids]}

    rows = rows.map(encode, batched=True, remove_columns=rows["train"].column_names)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.num_epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.warmup_steps,
            weight_decay=args.weight_decay,
            train_sampling_strategy="group_by_length",
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        data_collator=_collate,
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True  # the Trainer turns it off and leaves it so
    model.to(getattr(torch, args.save_dtype)).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    return {"eval/loss_nats_per_token": loss, "eval/perplexity": math.exp(loss)}
