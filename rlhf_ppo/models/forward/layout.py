"""Where the tokens of a batch lie, padded or packed: indices made on the host, so that no pass waits for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_ppo.models.forward.packing import Packing
from rlhf_ppo.runtime.machine.transfers import from_host


class Packed(NamedTuple):
    """B sequences of N tokens in all, as one row; those of equal length are neighbours."""

    places: Tensor
    """[N] where the tokens are in the batch's inputs [B, P + T - 1], flattened."""
    positions: Tensor
    """[1, N] positions, from 0 in each sequence."""
    before: Tensor
    """[n] where in the row the states before the response tokens are."""
    packing: Packing


class Aligned(NamedTuple):
    """B sequences with all padding behind them."""

    order: Tensor
    """[B, P + T - 1] which token of its row is at each place."""
    before: Tensor
    """[n] where the states before the response tokens are in the batch, flattened."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of B prompts [B, P] with their responses [B, T] lie; the last token of a row is never an input.

    Response tokens are the n True ones in ``mask``, in its order. Masks are on the host, indices on the device.
    """

    prompt_mask: Tensor
    """[B, P] bool, left-padded."""
    mask: Tensor
    """[B, T] bool, True on tokens that the policy chose."""
    real: Tensor
    """[B, T] bool, True on every real token, an environment's included."""
    device: torch.device

    @classmethod
    def read(cls, prompt_mask: Tensor, mask: Tensor, real: Tensor | None = None) -> Layout:
        """Read a layout from masks, on their device; a GPU is waited for."""
        host = [x.cpu() for x in (prompt_mask, mask, mask if real is None else real)]
        return cls(*host, device=mask.device)

    def rows(self, rows: Sequence[int], prompt_tokens: int, tokens: int) -> Layout:
        """Return the layout of some rows, trimmed to the last columns of prompts and the first of responses."""
        index = torch.tensor(rows)
        return Layout(
            self.prompt_mask[index, -prompt_tokens:],
            self.mask[index, :tokens],
            self.real[index, :tokens],
            self.device,
        )

    def select(self, x: Tensor) -> Tensor:
        """Take ``x`` [B, T, ...] at response tokens, [n, ...]."""
        x = x.flatten(0, 1)
        return x if len(self.chosen) == len(x) else x.index_select(0, self.chosen)

    def place(self, values: Tensor) -> Tensor:
        """Undo :meth:`select`: [n] -> [B, T], 0 elsewhere."""
        nothing = values.new_zeros(self.mask.numel())
        return nothing.scatter(0, self.chosen, values).view(self.mask.shape)

    @cached_property
    def chosen(self) -> Tensor:
        """[n] where response tokens are in [B, T], flattened."""
        return self._sent(self.mask.flatten().nonzero().squeeze(1))

    @cached_property
    def before(self) -> Tensor:
        """[n] where the states before response tokens are in the padded inputs [B, P + T - 1], flattened."""
        rows, steps = self.mask.nonzero().unbind(dim=1)
        return self._sent(rows * self._width + self.prompt_mask.shape[1] - 1 + steps)

    @cached_property
    def packed(self) -> Packed:
        """The same sequences end to end in one row."""
        # A token is an input where another follows it.
        real = torch.cat([self.prompt_mask, self.real[:, 1:]], dim=1)
        lengths, order = real.sum(dim=1).sort()
        kept = real[order]
        places = (order[:, None] * self._width + torch.arange(self._width))[kept]
        at = torch.empty(real.shape, dtype=torch.long)
        at[order] = kept.flatten().cumsum(0).view_as(at) - 1
        before = at[:, self.prompt_mask.shape[1] - 1 :][self.mask]
        positions = (kept.cumsum(dim=1) - 1)[kept][None]
        packing = Packing(tuple(lengths.tolist()), self.device)
        return Packed(self._sent(places), self._sent(positions), self._sent(before), packing)

    @cached_property
    def aligned(self) -> Aligned:
        """The same sequences, each beginning at column 0."""
        real = torch.cat([self.prompt_mask, self.real[:, :-1]], dim=1)
        order = (~real).byte().argsort(dim=1, stable=True)
        rows = torch.arange(len(real))[:, None] * self._width
        before = (rows + real.cumsum(dim=1)[:, self.prompt_mask.shape[1] - 1 :] - 1)[self.mask]
        return Aligned(self._sent(order), self._sent(before))

    @property
    def _width(self) -> int:
        return self.prompt_mask.shape[1] + self.mask.shape[1] - 1

    def _sent(self, index: Tensor) -> Tensor:
        return from_host(index, self.device)
