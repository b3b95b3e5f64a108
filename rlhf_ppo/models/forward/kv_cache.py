"""The key-value cache for decoding: allocated once, rows removed or repeated; or a cache of tokens alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """transformers' growing layer, allocated once for all steps instead of copied at every step."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate [B, H, capacity, D]."""
        super().lazy_initialization(key_states, value_states)
        dtype = attention_dtype(key_states)
        self._keys, self._values = (
            x.new_empty(*x.shape[:2], self.capacity, x.shape[3], dtype=dtype) for x in (key_states, value_states)
        )
        self.keys, self.values = self._keys[:, :, :0], self._values[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new states; return all states as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, or repeat them."""
        if not self.is_initialized:
            return
        assert self.keys is not None
        length, rows = self.keys.shape[2], len(indices)

        def select(states: Tensor) -> Tensor:
            room = states[:rows] if rows <= len(states) else states.new_empty(rows, *states.shape[1:])
            room[:, :, :length] = states[indices, :, :length]
            return room

        self._keys, self._values = select(self._keys), select(self._values)
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep or repeat rows; the name that all kinds of transformers' layers share."""
        self.batch_select_indices(beam_idx)


class TokenCache:
    """The tokens so far, for models without a usable cache: each step runs over all of them again."""

    def __init__(self) -> None:
        """Start empty."""
        self.ids: Tensor | None = None
        self.lengths = torch.zeros(0, dtype=torch.long)

    def add(self, ids: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens: first left-padded prompts [B, P] (False in ``attention``), then one each [B, 1].

        Returns:
            All tokens [B, L], right-padded, and the index [B] of each row's last one.
        """
        if self.ids is None:
            real = attention[:, : ids.shape[1]].bool()
            self.ids = ids.gather(1, (~real).byte().argsort(dim=1, stable=True))
            self.lengths = real.sum(dim=1)
        else:
            self.ids = pad(self.ids, (0, 1)).scatter(1, self.lengths[:, None], ids)
            self.lengths = self.lengths + 1
        return self.ids, self.lengths - 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep some rows, or repeat them."""
        assert self.ids is not None
        self.ids, self.lengths = self.ids[beam_idx], self.lengths[beam_idx]


def attention_dtype(key_states: Tensor) -> torch.dtype:
    """Return the format in which attention reads keys and values, whatever precision rotation has left them in."""
    kind = key_states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else key_states.dtype


def preallocated_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """Return transformers' cache for this model, its ordinary layers allocated once for ``capacity`` tokens.

    Layers of another kind (sliding windows, recurrent states) stay as transformers makes them.
    """
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
