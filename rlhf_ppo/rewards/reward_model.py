"""Reward models: a sequence-classification model as a reward function, with its own tokenizer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ppo.data.chat import Completion, Prompt, read_chat_template, render_completed
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.data.tokenization import encode_text, require_vocabulary
from rlhf_ppo.models.acceleration.working_copy import computing, held_in_bf16, hold_in_bf16
from rlhf_ppo.models.dropout import freeze
from rlhf_ppo.models.loading import (
    context_length,
    find_config,
    fuse_activations,
    load_classifier,
    load_tokenizer,
    refuse_encoder_decoder,
    vocabulary_size,
)
from rlhf_ppo.models.sharded.in_step import most_anywhere
from rlhf_ppo.models.sharded.sharding import Sharding, has_layers, shard

NO_LIMIT = 2**31
"""Some tokenizers give 1e30 for "no limit"."""

ONE_STACK = "a decoder (GPT-2, Llama, Qwen, ...) or an encoder (BERT, DeBERTa, ...)"
"""The architectures of reward models, for messages."""


class RewardModel:
    """A sequence-classification model with one label as a reward function, with its own tokenizer.

    Text prompts are scored as prompt + completion; chats through the reward tokenizer's chat template. With a
    ``chat_template`` given, a text prompt becomes a chat of one user message.
    """

    together = False
    """Whether processes share the weights (:meth:`share`), and must all call at once."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        chat_template: str | None = None,
        max_length: int | None = None,
    ) -> None:
        """Load a hub id or folder, or wrap a model; freeze it in evaluation mode.

        Args:
            model: hub id, folder or model with ``num_labels=1``.
            tokenizer: the model's; None: the one in its folder. It is not modified.
            device: where to score.
            batch_size: texts per forward pass.
            chat_template: Jinja text for chats, a file with it, or "tokenizer" for the tokenizer's own; text prompts
                then become a user message. None: chats through the tokenizer's own template, text as it is.
            max_length: at most this many tokens, special ones included; longer texts lose their beginning, because
                the completion is at the end. None: the smaller of the tokenizer's and the model's limit.
        Raises:
            ValueError: more than one label, an encoder-decoder model, a bare model without a tokenizer, or
                ``chat_template="tokenizer"`` where the tokenizer has none.
        """
        source = model if isinstance(model, str) else model.config._name_or_path
        config = find_config(model)
        self.__name__ = Path(source).name or type(model).__name__
        refuse_encoder_decoder(
            config, f"reward model {self.__name__!r}", f"use {ONE_STACK}, or call it in your own reward function"
        )
        if config.num_labels != 1:
            raise ValueError(
                f"reward model {self.__name__!r} has num_labels={config.num_labels}, but a reward is one number; "
                "use a model with num_labels=1, or wrap this one in a function that picks a label"
            )
        if tokenizer is None and not source:
            raise ValueError(
                "a reward model that was not loaded from a folder or hub id needs its tokenizer: "
                "pass RewardModel(model, tokenizer) as the reward function"
            )
        self._set_tokenizer(tokenizer or load_tokenizer(source), chat_template)
        # Positions beyond the model's own would be an index error.
        limits = (max_length, self.tokenizer.model_max_length, context_length(config))
        self.max_length = min((limit for limit in limits if limit is not None and limit < NO_LIMIT), default=None)
        self.vocab_size = int(getattr(config.get_text_config(), "vocab_size", NO_LIMIT))  # CANINE reads characters
        self.bf16, self._loaded = False, isinstance(model, str)
        if isinstance(model, str):
            model = load_classifier(model)
        self.model: Any = freeze(cast(PreTrainedModel, model)).to(device)
        fuse_activations(self.model)
        self.batch_size = batch_size
        if batch_size > 1 and not padding_is_harmless(self.model, self.tokenizer, self.__name__):
            self.batch_size = 1

    def compute_in(self, *, bf16: bool) -> None:
        """Score in bfloat16 from now on, if ``bf16``, all but the head; a model that was loaded here is held in it."""
        if bf16 and self._loaded:
            hold_in_bf16(self.model)
        self.bf16 = bf16 or held_in_bf16(self.model)

    def share(self, sharding: Sharding) -> None:
        """Share the weights among processes, in place; a model without known layers stays whole."""
        if has_layers(self.model):
            shard(self.model, sharding)
            self.together = True

    def _set_tokenizer(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        self.tokenizer: PreTrainedTokenizerBase = copy.deepcopy(tokenizer)
        self.text_as_chat = chat_template is not None
        if chat_template is not None and chat_template != "tokenizer":
            self.tokenizer.chat_template = read_chat_template(chat_template)
        if self.text_as_chat and not self.tokenizer.chat_template:
            raise ValueError(
                f"reward model {self.__name__!r}: its tokenizer has no chat template; "
                "give the template itself instead of 'tokenizer'"
            )

    def require_readable(self, prompts: PromptSet) -> None:
        """Raise a ValueError that names the first row on whose prompt, once answered, the chat template fails."""
        for prompt, row in zip(prompts.rows["prompt"], prompts.rows.names, strict=True):
            self._text(prompt, "x", f"reward model {self.__name__!r}, {row}")

    def _text(self, prompt: Prompt, completion: Completion, where: str = "the chat") -> str:
        if isinstance(prompt, str) and self.text_as_chat:
            prompt = [{"role": "user", "content": prompt}]
        return render_completed(self.tokenizer, prompt, completion, where)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Any) -> list[float]:
        """Return the model's one logit for each prompt with its completion."""
        pairs = zip(prompts, completions, strict=True)
        texts = [self._text(*pair, f"reward model {self.__name__!r}, completion {i}") for i, pair in enumerate(pairs)]
        rows = [encode_text(self.tokenizer, text, ended=True, limit=self.max_length) for text in texts]
        for i, ids in enumerate(rows):
            require_vocabulary(ids, self.vocab_size, f"reward model {self.__name__!r}, completion {i}")
        scores: list[float] = []
        with computing(self.model, bf16=self.bf16):
            for start in range(0, len(rows), self.batch_size):
                scores += text_scores(self.model, self.tokenizer, rows[start : start + self.batch_size]).tolist()
            if self.together:  # as many passes as the process with the most texts makes
                passes = -(-len(rows) // self.batch_size)
                for _ in range(most_anywhere(passes, self.model.device) - passes):
                    text_scores(self.model, self.tokenizer, [[0]])
        return scores


@torch.no_grad()
def padding_is_harmless(model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Check whether a text has the same score alone and padded beside a longer one; warn if not.

    Raises:
        ValueError: the model cannot score token ids; says which.
    """
    size = getattr(model.config.get_text_config(), "vocab_size", 256)
    rows = [[i * 7 % size for i in range(1, 9)], [i * 5 % size for i in range(1, 4)]]
    try:
        together = text_scores(model, tokenizer, rows)
        alone = text_scores(model, tokenizer, rows, padded=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"reward model {name!r} cannot score token ids ({why}): use another model") from error
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    if (together - alone).abs().max() <= (0.05 if half else 1e-4) * alone.abs().max():
        return True
    warnings.warn(
        f"reward model {name!r} ({model.config.model_type}) scores a padded text differently, so texts are "
        "scored one by one, which is right but slow",
        stacklevel=4,
    )
    return False


def text_scores(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], *, padded: bool = True
) -> Tensor:
    """Compute a one-label classifier's logit [B] of each row of token ids, with gradients; padded, or one by one."""
    if not padded:
        return torch.cat([text_scores(model, tokenizer, [row]) for row in rows])
    # Decoder classifiers pool at the last token that is not the pad id: one token early if pad == eos. So pad with an
    # id that occurs in no row.
    used = {token for row in rows for token in row}
    pad = tokenizer.pad_token_id
    if pad is None or pad in used:
        pad = next((i for i in range(vocabulary_size(model.config)) if i not in used), None)
    if pad is None and len(rows) > 1:
        # Together the rows use the whole vocabulary; one by one they need no padding.
        middle = len(rows) // 2
        return torch.cat([text_scores(model, tokenizer, part) for part in (rows[:middle], rows[middle:])])
    model.config.get_text_config().pad_token_id = pad
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    return model(input_ids=ids, attention_mask=mask).logits.float().squeeze(-1)
