"""Data: where rows come from, what a prompt may be, and how prompts become token ids."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config import RLHFConfig
from rlhf_ppo.sources import why_not
from rlhf_ppo.text import encode_text

Prompt = str | list[dict[str, str]]
"""A prompt is text, or chat messages: ``[{"role": "user", "content": "..."}]``."""
Completion = str | list[dict[str, str]]
"""What followed a prompt: text, or after several turns with a chat prompt the messages after it."""

ROW_NAME = "__row_name__"
"""Column that says which row this is, "prompts.jsonl row 3", whatever was mixed, shuffled or set aside since."""

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_rows(source: str, split: str = "train") -> Dataset:
    """One split of a data set: a csv, json(l) or parquet file (``.gz`` too), a folder of these, or a hub id.

    A single file is all of split "train"; a part of one is named as ``datasets`` does, such as "train[:100]".

    Raises:
        FileNotFoundError: ``source`` looks like a path and is not there.
        ValueError: the file's ending names no known format, it has no such split, it cannot be read, or the data set is
            empty.
    """
    path = Path(source).expanduser()
    if path.is_file():
        ending = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
        if ending not in _FORMATS:
            raise ValueError(f"{source}: unknown ending {ending!r}; use one of {sorted(_FORMATS)} (also with .gz)")
        if path.stat().st_size == 0:
            raise ValueError(f"data set {source} has no rows")
        if any(part.split("[")[0].strip() != "train" for part in split.split("+")):
            raise ValueError(
                f"split={split!r}: {source} is a single file, which has no splits: leave split out, or name the file "
                "that holds these rows"
            )
        rows = _load(source, _FORMATS[ending], data_files=str(path), split=split)
    elif path.exists():
        rows = _load(source, str(path), split=split)
    elif path.suffix in {*_FORMATS, ".gz"} or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data file {source} does not exist (working folder: {Path.cwd()})")
    else:
        rows = _load(source, source, split=split)
    if len(rows) == 0:
        raise ValueError(f"data set {source} has no rows")
    return rows


def _load(source: str, *args: Any, **options: Any) -> Dataset:
    try:
        return cast(Dataset, load_dataset(*args, **options))
    except DatasetGenerationError as error:  # what is wrong with the file is its cause
        raise ValueError(f"data set {source} cannot be read: {error.__cause__ or error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        if "corresponds to no data" in str(error):  # a csv that holds its header alone
            raise ValueError(f"data set {source} has no rows in split {options.get('split')!r}") from None
        local = Path(source).expanduser().exists() or isinstance(error, ValueError)
        reason = (str(error).splitlines() or [""])[0] if local else why_not(source, error, kind="dataset")
        raise ValueError(f"data set {source} cannot be read: {reason}") from error


def row_names(rows: Dataset, where: str = "") -> list[str]:
    """What messages call each row: what its column ROW_NAME says, or else ``where`` and its number."""
    if ROW_NAME in rows.column_names:
        return list(rows[ROW_NAME])
    return [f"{where}row {i}" for i in range(len(rows))]


def require_column(rows: Dataset, column: str) -> None:
    """Raise a ValueError that lists the columns and the closest match unless ``column`` is there."""
    if column in rows.column_names:
        return
    columns = [name for name in rows.column_names if name != ROW_NAME]
    close = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"the data set has no column {column!r}, its columns are {columns}{hint}")


def prompt_rows(rows: Dataset, column: str) -> Dataset:
    """The rows with ``column`` under the name "prompt".

    Raises:
        ValueError: there is no such column, or another one is called "prompt" already.
    """
    require_column(rows, column)
    if column == "prompt":
        return rows
    if "prompt" in rows.column_names:
        raise ValueError(f"the data set has a column 'prompt' beside prompt_column={column!r}: rename one of them")
    return rows.rename_column(column, "prompt")


def tokenize_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Token ids of one prompt; chat messages go through the tokenizer's chat template, ready for a reply.

    Raises:
        ValueError: the prompt is empty, neither text nor messages, or a chat without a chat template; names ``where``.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"{where}: the prompt is empty; remove the row or give it text")
        ids = encode_text(tokenizer, prompt, ended=False)
    elif is_chat(prompt):
        if not tokenizer.chat_template:
            raise ValueError(
                f"{where}: the prompt is a chat, but the tokenizer has no chat template; "
                "take a model whose tokenizer has one (in Python pass it as processing_class), or write prompts as text"
            )
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    else:
        raise ValueError(f"{where}: a prompt must be text or chat messages, got {type(prompt).__name__}: {prompt!r}")
    if not ids:
        raise ValueError(f"{where}: the prompt {prompt!r} has no tokens; remove the row or give it text")
    return cast(list[int], ids)


def require_vocabulary(ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raise a ValueError that names ``where`` if the model has no embedding for one of the ids."""
    if max(ids, default=0) >= vocab_size:
        raise ValueError(
            f"{where}: token id {max(ids)} is not in the model's vocabulary of {vocab_size}; "
            "the tokenizer belongs to another model"
        )


def is_chat(prompt: Any) -> bool:
    """Whether this is a list of messages with role and content."""
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in prompt)
    )


def fit_prompt(ids: list[int], room: int | None, policy: str, where: str) -> list[int] | None:
    """The ids if they leave room for the response; else an error, their end, or None (drop), by ``policy``."""
    if room is None or len(ids) <= room:
        return ids
    if policy == "error":
        raise ValueError(
            f"{where}: the prompt has {len(ids)} tokens, but the model's context leaves room for {max(room, 0)} beside "
            "max_new_tokens; shorten it, lower max_new_tokens, or, in training, set overlong_prompts to 'truncate' or "
            "'drop'"
        )
    return ids[-room:] if policy == "truncate" else None


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    room: int | None,
    truncate: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Left-padded token ids [B, P] and bool mask [B, P] of prompts; overlong ones are an error or keep their end."""
    policy = "truncate" if truncate else "error"
    rows: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        ids = tokenize_prompt(prompt, tokenizer, f"prompt {i}")
        rows.append(fit_prompt(ids, room, policy, f"prompt {i}") or [])
    return left_pad(rows, filler=0, device=device)


def left_pad(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, P] padded on the left, and their bool mask [B, P]: the mask says what is padding, never an id."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = True
    return ids.to(device), mask.to(device)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts with their other columns, which the reward functions receive."""

    prompts: list[Prompt]
    columns: dict[str, list[Any]]


class PromptSet:
    """A data set of prompts, checked when it is built, and dealt out in an order that a seed and a number fix."""

    def __init__(
        self,
        rows: Dataset | Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        args: RLHFConfig,
        *,
        vocab_size: int,
        room: int | None,
        name: str = "train_dataset",
    ) -> None:
        """Check every prompt.

        Args:
            rows: a data set (or a list of mappings) with a column ``prompt``.
            tokenizer: the policy's.
            args: the policy for overlong prompts, the seed.
            vocab_size: ids must lie below it.
            room: most tokens a prompt may have; None: no limit is known.
            name: what to call the data set in messages.
        Raises:
            ValueError: no rows, no column ``prompt``, or a bad prompt; names the row.
        """
        if isinstance(rows, Mapping):
            raise ValueError(f"{name} holds the splits {list(rows)}: pass one of them, such as dataset['train']")
        if not isinstance(rows, Dataset):
            unsized = isinstance(rows, (str, IterableDataset))
            listed: list[Any] = [] if unsized else list(rows)
            if unsized or not all(isinstance(row, Mapping) for row in listed):
                raise ValueError(
                    f"{name} must be a data set of known length or a list of mappings with a key 'prompt', "
                    f"got {type(rows).__name__}"
                )
            rows = Dataset.from_list([dict(row) for row in listed])
        if len(rows) == 0:
            raise ValueError(f"{name} has no rows")
        require_column(rows, "prompt")
        if room is not None and room < 1:
            raise ValueError(f"max_new_tokens={args.max_new_tokens} leaves no room for a prompt in the model's context")
        kept: list[int] = []
        truncated = 0
        for i, (prompt, where) in enumerate(zip(rows["prompt"], row_names(rows, f"{name} "), strict=True)):
            ids = tokenize_prompt(prompt, tokenizer, where)
            require_vocabulary(ids, vocab_size, where)
            fitted = fit_prompt(ids, room, args.overlong_prompts, where)
            if fitted is not None:
                truncated += len(fitted) < len(ids)
                kept.append(i)
        if dropped := len(rows) - len(kept):
            warnings.warn(f"{name}: dropped {dropped} of {len(rows)} prompts longer than {room} tokens", stacklevel=3)
        if truncated:
            warnings.warn(
                f"{name}: {truncated} of {len(rows)} prompts keep their last {room} tokens only", stacklevel=3
            )
        if not kept:
            raise ValueError(f"{name}: every prompt is longer than the {room} tokens that the context leaves")
        self.name = name
        self.columns = [column for column in rows.column_names if column not in ("prompt", ROW_NAME)]
        self.rows = rows.select(kept).select_columns(["prompt", *self.columns])
        self.seed = args.seed

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> PromptBatch:
        """The rows with these indices."""
        picked = [self.rows[int(i)] for i in indices]
        columns = {c: [row[c] for row in picked] for c in self.columns}
        return PromptBatch([row["prompt"] for row in picked], columns)

    def batch(self, number: int, size: int) -> PromptBatch:
        """Batch ``number`` of an endless stream that shuffles the data set anew in each pass."""
        first = number * size
        order: dict[int, list[int]] = {}
        indices: list[int] = []
        for k in range(first, first + size):
            epoch, position = divmod(k, len(self))
            if epoch not in order:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order[epoch] = torch.randperm(len(self), generator=generator).tolist()
            indices.append(order[epoch][position])
        return self.take(indices)
