"""Prompts: a data set of them, checked when it is built and drawn in a seeded order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.chat import Prompt
from rlhf_ppo.data.order import PromptOrder, prompt_order
from rlhf_ppo.data.rows import RowSource, as_rows, require_column
from rlhf_ppo.data.template_options import Schema, TemplateDefaults, require_read, template_of_rows
from rlhf_ppo.data.tokenization import fit_prompt, require_room, require_vocabulary, tokenize_prompt


@dataclass(frozen=True)
class PromptBatch:
    """Prompts with their other columns, which the reward functions receive."""

    prompts: list[Prompt]
    """None instead of a prompt: the row has none, and an environment chooses it."""
    columns: dict[str, list[Any]]

    def row(self, i: int) -> dict[str, Any]:
        """Return all of one row."""
        given = {} if self.prompts[i] is None else {"prompt": self.prompts[i]}
        return {**given, **{name: values[i] for name, values in self.columns.items()}}


class PromptSet:
    """A data set of prompts; the seed and an iteration's number fix its rows."""

    def __init__(
        self,
        rows: RowSource,
        tokenizer: PreTrainedTokenizerBase,
        args: RLHFConfig,
        *,
        vocab_size: int,
        room: int | None,
        name: str = "train_dataset",
        needs_prompts: bool = True,
        trains: bool = True,
        tools: Sequence[Schema] = (),
    ) -> None:
        """Check every prompt.

        Args:
            rows: a data set or a list of mappings, with a column ``prompt``.
            tokenizer: the policy's.
            args: overlong_prompts, max_new_tokens, chat_template_kwargs, seed and the curriculum.
            vocab_size: ids must lie below it.
            room: at most this many tokens in a prompt; None: no known limit.
            name: the data set's name in messages.
            tools: the run's, as chat templates know them; rows may have columns ``chat_template_kwargs`` and ``tools``.
            needs_prompts: False: there may be no column ``prompt``, because environments choose prompts.
            trains: whether the curriculum is about it.
        Raises:
            ValueError: no rows, no column ``prompt``, or an invalid prompt or difficulty; names the row.
        """
        rows = as_rows(rows, name)
        if len(rows) == 0:
            raise ValueError(f"{name} has no rows")
        self.has_prompts = needs_prompts or "prompt" in rows.column_names
        if self.has_prompts:
            require_column(rows, "prompt")
        require_room(room, args.max_new_tokens)
        kept: list[int] = [] if self.has_prompts else list(range(len(rows)))
        truncated = self.longest = 0
        templates = template_of_rows(rows, TemplateDefaults(args.chat_template_kwargs, tools))
        given = zip(rows["prompt"], rows.names, templates, strict=True) if self.has_prompts else ()
        for i, (prompt, where, template) in enumerate(given):
            require_read(tokenizer, prompt, template, where)
            ids = tokenize_prompt(prompt, tokenizer, where, template)
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
                f"{name}: truncated {truncated} of {len(rows)} prompts to their last {room} tokens", stacklevel=3
            )
        if not kept:
            raise ValueError(f"{name}: every prompt is longer than the {room} tokens that the context leaves")
        self.name = name
        self.columns = [column for column in rows.column_names if column != "prompt"]
        self.rows = rows.select(kept)
        self.order = PromptOrder(len(kept), args.seed)
        if trains:
            self.order = prompt_order(self.rows, args, seed=args.seed, rollouts=args.num_rollouts)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> PromptBatch:
        """Return the rows with these indices."""
        picked = self.rows.select(map(int, indices)).to_list()
        columns = {c: [row[c] for row in picked] for c in self.columns}
        prompts: list[Any] = [row.get("prompt") for row in picked]  # None: an environment begins
        return PromptBatch(prompts, columns)

    def batch(
        self, iteration: int, size: int, *, count: int | None = None, after: int = 0, extra: int = 0
    ) -> PromptBatch:
        """Return ``count`` (default: ``size``) prompts of an iteration; see :meth:`.PromptOrder.rows`."""
        return self.take(self.order.rows(iteration, size, size if count is None else count, after=after, extra=extra))
