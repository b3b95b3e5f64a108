"""Tokenization: text and prompts to token ids, the special tokens around them, and left padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.data.chat import Prompt, TemplateOptions, is_chat, render_prompt

# Text


def encode_bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a text without special tokens, except those that it spells out."""
    return list(cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))


def encode_after(tokenizer: PreTrainedTokenizerBase, head: str, text: str) -> list[int] | None:
    """Return the ids of ``text`` in the encoding of ``head + text``, or None if a token spans the two."""
    before, both = encode_bare(tokenizer, head), encode_bare(tokenizer, head + text)
    return both[len(before) :] if both[: len(before)] == before else None


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, ended: bool, limit: int | None = None) -> list[int]:
    """Encode a text that begins a sequence, with the special tokens that the tokenizer adds around a text.

    Special tokens that the text already spells out at its ends are not added a second time.

    Args:
        ended: add the special tokens at the end too; False: something follows.
        limit: at most this many tokens; a longer text loses its beginning, but no special token.
    """
    body = encode_bare(tokenizer, text)
    start, end = _special_tokens_around(tokenizer, text)
    end = end if ended else []
    body = body[len(start) :] if body[: len(start)] == start else body
    body = body[: len(body) - len(end)] if end and body[-len(end) :] == end else body
    room = len(body) if limit is None else max(0, limit - len(start) - len(end))
    return [*start, *body[max(0, len(body) - room) :], *end]


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Find the special tokens that the tokenizer adds before and after a text, from its first characters."""
    part = text[:32] if encode_bare(tokenizer, text[:32]) else text
    body = encode_bare(tokenizer, part)
    whole = list(cast(list[int], tokenizer(part, verbose=False)["input_ids"]))
    place = next((i for i in range(len(whole) - len(body) + 1) if whole[i : i + len(body)] == body), 0)
    return whole[:place], whole[place + len(body) :]


# Prompts


def tokenize_prompt(
    prompt: Any, tokenizer: PreTrainedTokenizerBase, where: str, template: TemplateOptions | None = None
) -> list[int]:
    """Encode one prompt; chat messages go through the tokenizer's chat template, ready for a reply.

    Raises:
        ValueError: the prompt is empty, neither text nor messages, or a chat that cannot be rendered (see
            :func:`rlhf_ppo.data.chat.render_prompt`); names ``where``.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"{where}: the prompt is empty; remove the row or give it text")
        ids = encode_text(tokenizer, prompt, ended=False)
    elif is_chat(prompt):
        text = render_prompt(tokenizer, prompt, where, template)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        raise ValueError(f"{where}: a prompt must be text or chat messages, got {type(prompt).__name__}: {prompt!r}")
    if not ids:
        raise ValueError(f"{where}: the prompt {prompt!r} has no tokens; remove the row or give it text")
    return cast(list[int], ids)


def require_vocabulary(ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raise a ValueError that names ``where`` if an id lies outside the model's vocabulary."""
    if max(ids, default=0) >= vocab_size:
        raise ValueError(
            f"{where}: token id {max(ids)} is not in the model's vocabulary of {vocab_size}; "
            "the tokenizer belongs to another model"
        )


def require_room(room: int | None, max_new_tokens: int) -> None:
    """Raise a ValueError if the response leaves no room for a prompt in the model's context."""
    if room is not None and room < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context")


def fit_prompt(ids: list[int], room: int | None, policy: str, where: str, *, bos: Any = None) -> list[int] | None:
    """Return the ids if they leave room for the response; else raise, truncate or drop (None), by ``policy``.

    Truncation keeps the end, and the id ``bos`` in front if it was there and more than one token fits.
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
    templates: Sequence[TemplateOptions] | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode and left-pad prompts: ids [B, P] and bool mask [B, P]; overlong ones raise or are truncated.

    ``templates`` [B] are what the chat template of each gets besides messages.
    """
    policy = "truncate" if truncate else "error"
    rows: list[list[int]] = []
    for i, (prompt, template) in enumerate(zip(prompts, templates or [{}] * len(prompts), strict=True)):
        ids = tokenize_prompt(prompt, tokenizer, f"prompt {i}", template)
        rows.append(fit_prompt(ids, room, policy, f"prompt {i}", bos=tokenizer.bos_token_id) or [])
    return left_pad(rows, device)


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token ids on the left to [B, P]; the bool mask [B, P] alone says what is padding, never an id."""
    width = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = True
    return ids.to(device), mask.to(device)
