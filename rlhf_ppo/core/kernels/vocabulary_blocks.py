"""The output layer in blocks of the vocabulary, so that what a product writes is still in the cache when it is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.core.types import BannedTokens, compute_dtype

CHUNK_LOGITS = 2**25
"""Logits held at once by default: 128 MiB in float32."""

BLOCK_LOGITS, BLOCK_WORDS = 2**20, 256
"""Size of a block: 4 MiB of float32 logits, and at least 256 words."""

_AUTOCASTS = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
"""Devices that have autocast; asked once, because torch 2.11 cannot compile code that asks."""

_SAMPLE = 1024
"""Words whose largest logit is estimated before the product: the first ones (in BPE the most frequent), and as many
spread over the rest."""


def check_ban(ban: BannedTokens | None, rows: int) -> None:
    """Raise a ValueError unless ``ban`` has one flag for each of the N rows."""
    if ban is not None and ban.where.shape != (rows,):
        raise ValueError(f"ban.where {tuple(ban.where.shape)} must be [N] for N = {rows} hidden states")


def blocks_of(vocabulary: int, rows: int, device: torch.device) -> list[slice]:
    """Split the vocabulary into blocks whose logits for ``rows`` states fit a CPU's cache; elsewhere one block."""
    return chunks_of(vocabulary, max(BLOCK_LOGITS // max(rows, 1), BLOCK_WORDS) if device.type == "cpu" else vocabulary)


def chunks_of(total: int, size: int) -> list[slice]:
    """Split ``total`` into slices of ``size``; the last may be shorter."""
    return [slice(start, start + size) for start in range(0, total, size)]


def places_in(tokens: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return each token's place in a block [1, n], 0 if it is in another, and whether it is in this one [n]."""
    place = tokens - block.start
    inside = (place >= 0) & (tokens < block.stop)
    return torch.where(inside, place, 0)[None], inside


def under_autocast(device: torch.device) -> bool:
    """Return whether autocast is on; never on devices that have none."""
    return device.type in _AUTOCASTS and torch.is_autocast_enabled(device.type)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the products' dtype: autocast's where it is on, else the shorter one of the two tensors."""
    if under_autocast(hidden.device):
        return torch.get_autocast_dtype(hidden.device.type)
    return weight.dtype if weight.itemsize < hidden.itemsize else hidden.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the tensor's device."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind in _AUTOCASTS else nullcontext()


def below_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract each column's largest logit [n] from the logits [block, n] in place; returns both."""
    # A block of banned tokens has no largest logit to subtract.
    largest = logits.amax(dim=0).clamp_(min=torch.finfo(logits.dtype).min)
    return logits.sub_(largest), largest


class ChunkLogits:
    """Logits of a chunk of rows, computed one block of the vocabulary at a time."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        temperature: float = 1.0,
        low: torch.dtype,
        rows: slice | None = None,
        ban: BannedTokens | None = None,
    ) -> None:
        """Prepare the states of a chunk of rows.

        Args:
            hidden, weight, bias: [N, O], [V, O] and [V] or None.
            temperature: divides the logits.
            low: dtype of the products.
            rows: the chunk, of N rows; None: all of them. (torch 2.11 cannot compile a slice as a default.)
            ban: of all N rows.
        """
        states = hidden if rows is None else hidden[rows]
        # Divided by the temperature before it is rounded.
        self.states = (states if temperature == 1 else states / temperature).to(low).T
        """[O, n] in the products' dtype."""
        self._weight, self._bias, self._temperature = weight, bias, temperature
        self._ban = ban if ban is None or rows is None else BannedTokens(ban.where[rows], ban.tokens)
        self._shift: Tensor | None = None  # no cached_property, which torch.compile cannot read

    @property
    def shift(self) -> Tensor | None:
        """Estimate the largest logit of each state, for dtypes below float32; None: logits need no shift.

        bfloat16 keeps 8 bits: logits near 100, as GPT-2's are, would be rounded to halves. Instead their distance from
        this number is rounded, which is small for all words that matter.
        """
        states, weight = self.states, self._weight
        if self._shift is None and states.dtype != compute_dtype(states):
            some = torch.cat([weight[:_SAMPLE], weight[_SAMPLE :: max(weight.shape[0] // _SAMPLE, 1)]])
            self._shift = (some.to(states.dtype) @ states).amax(dim=0)
        return self._shift

    def block(self, block: slice, room: Tensor | None = None) -> Tensor:
        """Compute logits [block, n] minus the ``shift`` in the states' dtype; written into ``room`` if given."""
        words, shift = self._weight[block].to(self.states.dtype), self.shift
        if shift is None:
            logits = torch.mm(words, self.states, out=room)
        else:
            logits = torch.addmm(-shift, words, self.states, out=room)  # shifts before it rounds
        if self._bias is not None:
            logits.add_((self._bias[block, None] / self._temperature).to(logits.dtype))
        if self._ban is not None:
            for token in self._ban.tokens:
                if block.start <= token < block.stop:
                    logits[token - block.start].masked_fill_(self._ban.where, -math.inf)
        return logits


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add ``a @ b`` to ``total``, or set it at first; no temporary where the dtypes agree."""
    if first and a.dtype == total.dtype:
        torch.mm(a, b, out=total)
    elif first:
        total.copy_(a @ b)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


class HeadGradients:
    """Gradients of hidden, weight and bias, summed over blocks and chunks in the compute dtype and rounded once."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: Sequence[bool],
        *,
        temperature: float,
        low: torch.dtype,
    ) -> None:
        """Start with gradients of 0.

        Args:
            hidden, weight, bias: [N, O], [V, O] and [V] or None, as in forward.
            needed: which of the three need a gradient; nothing is computed for the others.
            temperature: divided the logits.
            low: dtype of the products.
        """
        self._inputs, self._temperature, self._low = (hidden, weight, bias), temperature, low
        dtype, device = compute_dtype(hidden), hidden.device
        self.hidden = torch.zeros(hidden.shape, dtype=dtype, device=device) if needed[0] else None
        self.weight = torch.empty(weight.shape, dtype=dtype, device=device) if needed[1] else None
        self.bias = torch.zeros(weight.shape[0], dtype=dtype, device=device) if needed[2] else None
        if self.weight is not None and not len(hidden):
            self.weight.zero_()  # no block will write to it

    def add(self, rows: slice, block: slice, states: Tensor, slope: Tensor, factor: Tensor) -> None:
        """Add the contribution of one block of logits for a chunk of rows.

        Args:
            rows, block: which; rows from the first chunk to the last.
            states: [O, n] of :class:`ChunkLogits`.
            slope: [block, n] in the products' dtype; times ``factor`` it is the gradient of logits / temperature.
            factor: [n] in the compute dtype.
        """
        dtype, weight = factor.dtype, self._inputs[1]
        if self.bias is not None:
            self.bias[block] += (slope.to(dtype) @ factor) / self._temperature
        if self.hidden is not None:
            product = slope.T @ weight[block].to(self._low)
            self.hidden[rows] += product.to(dtype).mul_((factor / self._temperature)[:, None])
        if self.weight is not None:
            _add_product(self.weight[block], slope, (states * factor).to(self._low).T, first=rows.start == 0)

    def result(self) -> tuple[Tensor | None, ...]:
        """Return the three gradients in the compute dtype, to which autograd applies their inputs' own; None: none."""
        return self.hidden, self.weight, self.bias
