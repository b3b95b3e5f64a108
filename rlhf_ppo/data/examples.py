"""Read examples for supervised fine-tuning: rows to token ids and labels, with prompts and padding masked."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.arguments.sft import SFTArgs
from rlhf_ppo.data.chat import Prompt, TemplateOptions, render_answer, render_prompt
from rlhf_ppo.data.detokenization import Before, TextPieces
from rlhf_ppo.data.preferences import prompt_and_answer
from rlhf_ppo.data.rows import Rows, RowSource, as_rows, require_column
from rlhf_ppo.data.template_options import TemplateDefaults, require_read, template_of_rows
from rlhf_ppo.data.tokenization import encode_after, encode_text, require_vocabulary, tokenize_prompt

IGNORED = -100
"""Label of a token that is masked from the loss."""


class Example(NamedTuple):
    """One row: a prompt, which is masked from the loss, and the completion that is learned."""

    prompt: Prompt
    completion: str
    where: str
    """The row's name in messages."""
    template: TemplateOptions | None = None
    """What its chat is rendered with besides messages."""


def hold_out(rows: Rows, args: SFTArgs) -> dict[str, Rows]:
    """Split the rows into ``train`` and ``test``, by ``eval_fraction`` and ``seed``."""
    return rows.train_test_split(max(1, round(args.eval_fraction * len(rows))), seed=args.seed)


def read_examples(rows: RowSource, args: SFTArgs) -> list[Example]:
    """Read each row's example; a plain text is a completion of an empty prompt, so all of it is learned.

    Raises:
        ValueError: a missing column, or a row that is neither text nor a conversation; names the row.
    """
    rows = as_rows(rows)
    column = args.completion_column or args.text_column
    require_column(rows, column)
    if args.prompt_column is None:
        prompts: Iterable[Any] = [None] * len(rows)
    else:
        require_column(rows, args.prompt_column)
        prompts = rows[args.prompt_column]
    examples: list[Example] = []
    templates = template_of_rows(rows, TemplateDefaults(args.chat_template_kwargs))
    for where, prompt, answer, template in zip(rows.names, prompts, rows[column], templates, strict=True):
        plain = prompt is None and isinstance(answer, str)  # may be empty: text collections have such rows
        pair = ("", answer) if plain else prompt_and_answer(prompt, answer, f"{where}, {column}")
        if pair[0] == []:
            raise ValueError(f"{where}, {column}: a conversation needs a message before the assistant's answer")
        examples.append(Example(*pair, where, template))
    return examples


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, longest: int, name: str, *, vocab_size: int
) -> Dataset:
    """Tokenize each example, truncated to ``longest`` tokens: its ids, labels and length.

    The prompt is tokenized by itself, as under PPO, and the completion becomes the ids that decode to it after the
    prompt (a chat's answer the ids that it has in the chat); then follows one end-of-text token. Prompt tokens are
    masked from the loss, and so is the first token of a sequence, which nothing predicts; an empty text is left out.

    Args:
        examples: the rows.
        tokenizer: with an end-of-text token.
        longest: maximum number of tokens.
        name: of this part of the data, in messages.
        vocab_size: of the model.
    Raises:
        ValueError: a prompt that cannot be read or a token id beyond ``vocab_size`` (names the row), or no prompt
            leaves room for its completion.
    """
    encoded: list[dict[str, Any]] = []
    filled = 0
    pieces = TextPieces(tokenizer, special=True)
    for example in examples:
        where = example.where
        require_read(tokenizer, example.prompt, example.template or {}, where)
        start, answer = _encode(example, tokenizer, pieces)
        end = [] if answer[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
        ids = [*start, *answer, *end][:longest]
        require_vocabulary(ids, vocab_size, where)
        given = max(1, len(start))
        filled += len(start) >= longest
        if len(ids) > given:
            encoded.append({"input_ids": ids, "labels": [IGNORED] * given + ids[given:], "length": len(ids)})
    if not encoded:
        raise ValueError(
            f"{name}: there is nothing to learn: every prompt fills max_length={longest} and leaves no room for its "
            "completion, or every text is empty"
        )
    if filled:
        warnings.warn(
            f"{name}: left out {filled} of {len(examples)} rows whose prompt fills the {longest} tokens",
            stacklevel=3,
        )
    return Dataset.from_list(encoded)


def _encode(example: Example, tokenizer: PreTrainedTokenizerBase, pieces: TextPieces) -> tuple[list[int], list[int]]:
    """Tokenize prompt and completion, which together decode to the text of both."""
    prompt, completion, where, template = example
    if not prompt:
        return [], encode_text(tokenizer, completion, ended=False)
    start = tokenize_prompt(prompt, tokenizer, where, template)
    if isinstance(prompt, str):
        return start, pieces.encode(pieces.before(start, prompt), completion)
    answer = render_answer(tokenizer, prompt, completion, where, template)
    in_chat = encode_after(tokenizer, render_prompt(tokenizer, prompt, where, template), answer)
    return start, pieces.encode(Before(start), answer) if in_chat is None else in_chat


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad rows on the right to a batch [B, T].

    Padding goes by length, never by id: the end-of-text token that ends a row stays a target.
    """
    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
