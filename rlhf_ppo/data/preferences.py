"""Preferences: prompt, chosen and rejected as pairs of texts, split by prompt, and their token ids."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.data.chat import Prompt, ends_in_prefill, is_chat, message_text, render_completed
from rlhf_ppo.data.rows import RowSource, as_rows, require_column
from rlhf_ppo.data.template_options import TemplateDefaults, require_read, template_of_rows
from rlhf_ppo.data.tokenization import encode_text, require_vocabulary

PairIds = tuple[list[int], list[int]]
"""Token ids of the chosen and of the rejected text."""


@dataclass(frozen=True)
class Preference:
    """One comparison, as texts that a reward model reads (see :func:`rlhf_ppo.data.chat.render_completed`)."""

    prompt: str
    """The common prompt as a key: rows with the same one stay on one side of the split."""
    chosen: str
    rejected: str
    margin: float
    """The chosen score should exceed the rejected one by at least this."""
    where: str = ""
    """The row's name in messages."""


def read_preferences(
    rows: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_column: str | None,
    chosen_column: str,
    rejected_column: str,
    margin_column: str | None = None,
    template: TemplateDefaults | None = None,
) -> list[Preference]:
    """Read the comparisons of a data set; rows with two equal answers are skipped with a warning.

    Answers are text or chat messages. Without a prompt column they are whole texts or conversations. With one, a text
    answers a text prompt or a chat, and messages continue a chat. ``template`` is what chats are rendered with besides
    messages.

    Raises:
        ValueError: a missing column, an invalid or empty answer, or no usable row; names the row.
    """
    rows = as_rows(rows)
    for column in (prompt_column, chosen_column, rejected_column, margin_column):
        if column is not None:
            require_column(rows, column)
    found: list[Preference] = []
    templates = template_of_rows(rows, template or TemplateDefaults())
    for where, row, options in zip(rows.names, rows, templates, strict=True):
        prompt = None if prompt_column is None else row[prompt_column]
        margin = 0.0 if margin_column is None else row[margin_column]
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not abs(margin) < float("inf"):
            raise ValueError(f"{where}: {margin_column} must be a finite number, got {margin!r}")
        sides = [prompt_and_answer(prompt, row[c], f"{where}, {c}") for c in (chosen_column, rejected_column)]
        require_read(tokenizer, sides[0][0], options, where)
        texts = [render_completed(tokenizer, *side, where, options) for side in sides]
        key = sides[0][0] if prompt is not None or sides[0][0] == sides[1][0] else ""
        # Whole texts without a prompt share nothing that could leak: each row is its own group.
        group = json.dumps(key) if key else where
        found.append(Preference(group, *texts, margin=float(margin), where=where))
    kept = [pair for pair in found if pair.chosen != pair.rejected]
    if not kept:
        raise ValueError(
            f"{chosen_column!r} and {rejected_column!r} hold the same text in all {len(found)} rows: nothing to learn"
        )
    if len(kept) < len(found):
        warnings.warn(
            f"skipped {len(found) - len(kept)} of {len(found)} rows whose {chosen_column!r} and {rejected_column!r} "
            "are the same text",
            stacklevel=2,
        )
    return kept


def prompt_and_answer(prompt: Any, answer: Any, where: str) -> tuple[Prompt, str]:
    """Split an answer that is text or chat messages into (prompt, completion), as reward functions receive them.

    Raises:
        ValueError: an empty answer, one that does not end with the assistant, or a chat that answers a text prompt.
    """
    if isinstance(answer, str):
        if not answer:
            raise ValueError(f"{where}: the answer is empty; remove the row or give it text")
        if prompt is None:
            return "", answer
        if isinstance(prompt, str) or is_chat(prompt):
            return prompt, answer
        raise ValueError(f"{where}: a prompt must be text or chat messages, got {type(prompt).__name__}: {prompt!r}")
    if not is_chat(answer):
        raise ValueError(f"{where}: an answer must be text or chat messages, got {type(answer).__name__}: {answer!r}")
    last = answer[-1]
    if last["role"] != "assistant" or last.get("tool_calls") or not message_text(last, where):
        raise ValueError(f"{where}: the last message must be the assistant's, and not empty: {last!r}")
    if isinstance(prompt, str):
        raise ValueError(
            f"{where}: the prompt is text but the answer is a chat; if the answer is the whole conversation, set "
            "prompt_column to None"
        )
    given = [*(prompt or []), *answer[:-1]]
    # A single message may continue the prompt's prefill, as a completion does.
    if len(answer) > 1 and ends_in_prefill(given):
        raise ValueError(f"{where}: two consecutive assistant messages at the end: join them into one")
    return given, message_text(last, where)


def split_by_prompt(
    pairs: Sequence[Preference], fraction: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """Split pairs into (training, held-out): about ``fraction`` of the prompts are held out, with all of their pairs.

    Raises:
        ValueError: fewer than two prompts.
    """
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    if len(prompts) < 2:
        raise ValueError(
            f"{len(pairs)} usable pairs of {len(prompts)} prompt: at least 2 prompts are needed, one of them held out"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held_out = {prompts[i] for i in order[:count]}
    return [pair for pair in pairs if pair.prompt not in held_out], [pair for pair in pairs if pair.prompt in held_out]


def encode_pairs(
    pairs: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[list[PairIds], int]:
    """Tokenize pairs, truncated to the tokenizer's model_max_length; also return how many were truncated.

    Raises:
        ValueError: a token id beyond ``vocab_size``; names the row.
    """

    def encode(texts: list[str], limit: int | None = None) -> list[list[int]]:
        return [encode_text(tokenizer, text, ended=True, limit=limit) for text in texts]

    sides = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    whole = [encode(side) for side in sides]
    for pair, chosen, rejected in zip(pairs, *whole, strict=True):
        require_vocabulary(chosen + rejected, vocab_size, pair.where)
    limit = tokenizer.model_max_length
    cut = sum(max(len(a), len(b)) > limit for a, b in zip(*whole, strict=True))
    kept = [encode(side, limit) for side in sides] if cut else whole
    return list(zip(*kept, strict=True)), cut
