"""Prompts: what a prompt may be, how it becomes token ids, and in which order a data set of them is dealt out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.chat import Messages, is_chat, prompt_text
from rlhf_ppo.data.detokenization import encode_text
from rlhf_ppo.data.rows import RowSource, as_rows, require_column

Prompt = str | Messages
"""A prompt is text, or chat messages: ``[{"role": "user", "content": "..."}]``."""
Completion = str | Messages
"""What followed a prompt: text, or after several turns with a chat prompt the messages after it."""


def tokenize_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Token ids of one prompt; chat messages go through the tokenizer's chat template, ready for a reply.

    Raises:
        ValueError: the prompt is empty, neither text nor messages, or a chat that cannot be rendered (see
            :func:`rlhf_ppo.data.chat.prompt_text`); names ``where``.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"{where}: the prompt is empty; remove the row or give it text")
        ids = encode_text(tokenizer, prompt, ended=False)
    elif is_chat(prompt):
        text = prompt_text(tokenizer, prompt, where)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
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


def require_room(room: int | None, max_new_tokens: int) -> None:
    """Raise a ValueError if the model's context has no room for a prompt beside the response."""
    if room is not None and room < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context")


def fit_prompt(ids: list[int], room: int | None, policy: str, where: str, *, bos: Any = None) -> list[int] | None:
    """The ids if they leave room for the response; else an error, their end, or None (drop), by ``policy``.

    The id ``bos`` stays in front where it was there, unless one token is all there is room for.
    """
    if room is None or len(ids) <= room:
        return ids
    if policy == "error":
        raise ValueError(
            f"{where}: the prompt has {len(ids)} tokens, but the model's context leaves room for {max(room, 0)} beside "
            "max_new_tokens; shorten it, lower max_new_tokens, or, in training, set overlong_prompts to 'truncate' or "
            "'drop'"
        )
    if policy != "truncate":
        return None
    return [bos, *ids[1 - room :]] if ids[0] == bos and room > 1 else ids[-room:]


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
        rows.append(fit_prompt(ids, room, policy, f"prompt {i}", bos=tokenizer.bos_token_id) or [])
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
        rows: RowSource,
        tokenizer: PreTrainedTokenizerBase,
        args: RLHFConfig,
        *,
        vocab_size: int,
        room: int | None,
        name: str = "train_dataset",
    ) -> None:
        """Check every prompt.

        Args:
            rows: a data set or a list of mappings, with a column ``prompt``.
            tokenizer: the policy's.
            args: the policy for overlong prompts, the seed.
            vocab_size: ids must lie below it.
            room: most tokens a prompt may have; None: no limit is known.
            name: what to call the data set in messages.
        Raises:
            ValueError: no rows, no column ``prompt``, or a bad prompt; names the row.
        """
        rows = as_rows(rows, name)
        if len(rows) == 0:
            raise ValueError(f"{name} has no rows")
        require_column(rows, "prompt")
        require_room(room, args.max_new_tokens)
        kept: list[int] = []
        truncated = self.longest = 0
        for i, (prompt, where) in enumerate(zip(rows["prompt"], rows.names, strict=True)):
            ids = tokenize_prompt(prompt, tokenizer, where)
            require_vocabulary(ids, vocab_size, where)
            fitted = fit_prompt(ids, room, args.overlong_prompts, where, bos=tokenizer.bos_token_id)
            if fitted is not None:
                truncated += len(fitted) < len(ids)
                self.longest = max(self.longest, len(fitted))  # tokens of the longest prompt
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
        self.columns = [column for column in rows.column_names if column != "prompt"]
        self.rows = rows.select(kept)
        self.seed = args.seed

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> PromptBatch:
        """The rows with these indices."""
        picked = self.rows.select(map(int, indices)).to_list()
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
