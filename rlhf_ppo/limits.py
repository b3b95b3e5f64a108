"""Decoding limits: strings that end a response, and a least length before which no stop token can be drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_LONGEST_CHARACTER = 4
"""Bytes, and so tokens, of a character in UTF-8."""


class TextStop:
    """Follows the text of B responses as they grow, and says which of them have come to contain a stop string.

    At each token only the last few are decoded, so the cost of a response is linear in its length.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], batch: int) -> None:
        """Start with ``batch`` empty responses."""
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        self._keep = max(map(len, strings)) - 1
        self._read: list[list[int]] = [[] for _ in range(batch)]  # the last tokens whose text is in the tail
        self._new: list[list[int]] = [[] for _ in range(batch)]  # tokens after them, whose text is not whole yet
        self._tail = [""] * batch

    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """[n] bool for the tokens [n] just drawn in the responses ``rows`` [n]."""
        found = [self._ends(row, token) for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        return torch.tensor(found, dtype=torch.bool, device=tokens.device)

    def _ends(self, row: int, token: int) -> bool:
        read, new = self._read[row], self._new[row]
        new.append(token)
        # Decoded behind the tokens before it, a token keeps the space or the bytes that alone it would lose.
        before, text = self._text(read), self._text(read + new)
        if text.endswith("\ufffd") and len(new) < _LONGEST_CHARACTER:
            return False  # the first bytes of a character
        tail = self._tail[row] + text[len(before) :]
        self._read[row], self._new[row] = new, []
        self._tail[row] = tail[len(tail) - self._keep :] if len(tail) > self._keep else tail
        return any(string in tail for string in self.strings)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


def cut_at(text: str, strings: Sequence[str]) -> str:
    """``text`` up to the first of the stop strings in it."""
    return text[: min((place for string in strings if (place := text.find(string)) >= 0), default=len(text))]


class Barred(NamedTuple):
    """Tokens that could not be drawn at some places of B responses: their distribution is renormalised without them."""

    where: Tensor
    """[B, T] bool, True only where the response's mask is."""
    tokens: tuple[int, ...]
    """The ids that were barred there."""


def bar(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Logits [*, V] with -inf at ``tokens``, in the same memory."""
    return logits.index_fill_(-1, torch.tensor(tokens, dtype=torch.long, device=logits.device), -math.inf)
