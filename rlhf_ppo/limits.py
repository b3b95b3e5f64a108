"""Decoding limits: strings that end a response, and a least length before which no stop token can be drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.core import linear_logprobs

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


def barred_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    barred: Tensor,
    barred_tokens: Sequence[int],
    bias: Tensor | None,
    temperature: float,
    return_entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`rlhf_ppo.core.linear_logprobs` of a distribution without ``barred_tokens`` in the rows ``barred`` [N].

    A bias of -inf takes them out: log p - log(1 - sum p(barred)) without its cancellation when they hold most of p.
    """
    shut = bar(torch.zeros_like(weight[:, 0]), barred_tokens)

    def of_rows(rows: Tensor, shut: Tensor | None) -> tuple[Tensor, ...]:
        result = linear_logprobs(
            hidden[rows],
            weight,
            tokens[rows],
            bias=with_bias(bias, shut),
            temperature=temperature,
            return_entropy=return_entropy,
        )
        return result if isinstance(result, tuple) else (result,)

    logprobs, *entropies = free_and_barred(barred, shut, of_rows)
    return (logprobs, entropies[0]) if return_entropy else logprobs


def free_and_barred(
    barred: Tensor, shut: Tensor, compute: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """``compute(rows, None)`` of the rows that are not ``barred`` [N] and ``compute(rows, shut)`` of those that are.

    Returns:
        Its results [N], in the order of all rows.
    """
    free, held = (~barred).nonzero().squeeze(-1), barred.nonzero().squeeze(-1)
    back = torch.cat([free, held]).argsort()
    return tuple(torch.cat(parts)[back] for parts in zip(compute(free, None), compute(held, shut), strict=True))


def with_bias(bias: Tensor | None, shut: Tensor | None) -> Tensor | None:
    """The sum of two biases [V], where None is 0."""
    return shut if bias is None else bias if shut is None else bias + shut
