"""The key-value cache of slots: rows of different lengths, in each of which another prompt can take its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, StaticLayer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_ppo.models.forward.kv_cache import attention_dtype


class SlotLayer(StaticLayer):
    """transformers' layer of fixed size, with a place of its own for each slot's next token.

    Keys and values of a token stand in the column of its position, so a slot's attention mask is True up to the
    position of its newest token. transformers counts columns of the whole batch: to it the newest token is the last.
    """

    def __init__(self, room: int, places: Tensor) -> None:
        """Make a layer for ``room`` tokens in each slot; ``places`` [S]: positions of the next tokens."""
        super().__init__(room)
        self.places = places
        self.seen = room
        """How many columns attention reads."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states [S, H, 1, D] of one token in each slot; return those of all columns that attention reads."""
        assert self.keys is not None and self.values is not None
        slots = torch.arange(len(self.places), device=self.places.device)
        for states, new in ((self.keys, key_states), (self.values, value_states)):
            # index_put, which torch.compile leaves in place; a scatter would copy all columns at each step.
            states[slots, :, self.places] = new[:, :, 0].to(states.dtype)
        return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]

    def insert(self, slots: Tensor, prompts: DynamicLayer, number: Tensor, columns: Tensor) -> None:
        """Write prompts into slots.

        Args:
            slots: [N] which slots.
            prompts: states [U, H, P, D] of the distinct ones.
            number: [N] which of them.
            columns: [N, P] the columns of ``prompts`` in the order of positions.
        """
        keys, values = prompts.keys, prompts.values
        assert keys is not None and values is not None
        if not self.is_initialized:
            dtype, n = attention_dtype(keys), len(self.places)
            self.lazy_initialization(*(x.new_empty(n, x.shape[1], 0, x.shape[3], dtype=dtype) for x in (keys, values)))
        assert self.keys is not None and self.values is not None
        places = torch.arange(columns.shape[1], device=columns.device)
        for states, new in ((self.keys, keys), (self.values, values)):
            states[slots] = 0  # masked, but non-finite states of the earlier response would still spread
            new = new.transpose(1, 2)[number[:, None], columns]
            states.transpose(1, 2)[slots[:, None], places] = new.to(states.dtype)

    def keep(self, index: Tensor, places: Tensor) -> None:
        """Keep some slots; ``places`` are theirs."""
        assert self.keys is not None and self.values is not None
        for states in (self.keys, self.values):
            states[: len(index), :, : self.seen] = states[index, :, : self.seen]
        self.keys, self.values, self.places = self.keys[: len(index)], self.values[: len(index)], places

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns attention reads, from which on."""
        return self.seen, 0

    def get_seq_length(self) -> int:
        """Return the number of columns before the newest token, as transformers counts them."""
        return self.seen - 1


class SlotCache(Cache):
    """A cache of S slots for ``room`` tokens each, all layers of the same kind."""

    layers: list[SlotLayer]

    def __init__(self, layers: int, slots: int, room: int, device: torch.device) -> None:
        """Make an empty cache."""
        self.room = room
        self.places = torch.zeros(slots, dtype=torch.long, device=device)
        """[S] the positions of the next tokens, in memory that stays where it is."""
        # Without this, a compiled step that writes here would not become a CUDA graph.
        torch._dynamo.mark_static_address(self.places)
        super().__init__(layers=[SlotLayer(room, self.places) for _ in range(layers)])

    def insert(self, slots: Tensor, prompts: DynamicCache, number: Tensor, lengths: Tensor) -> None:
        """Write left-padded prompts into slots.

        Args:
            slots: [N] which slots.
            prompts: the cache of the distinct ones.
            number: [N] which of them.
            lengths: [N] tokens of each.
        """
        width = prompts.get_seq_length()
        # What is behind the prompt stays unread until its tokens are written there.
        columns = (torch.arange(width, device=lengths.device) + (width - lengths)[:, None]).clamp(max=width - 1)
        for layer, prompt in zip(self.layers, prompts.layers, strict=True):
            layer.insert(slots, prompt, number, columns)  # pyright: ignore[reportArgumentType]

    def keep(self, index: Tensor) -> None:
        """Keep some slots."""
        self.places = self.places[index]
        for layer in self.layers:
            layer.keep(index, self.places)

    def read(self, seen: int) -> None:
        """Let attention read the first ``seen`` columns."""
        for layer in self.layers:
            layer.seen = seen


def count_slot_layers(config: PretrainedConfig, room: int) -> int:
    """Return the number of the model's layers if all attend to all of ``room`` tokens in a cache; else 0: no slots."""
    layers = DynamicCache(config=config).layers
    whole = (
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= room)
        for layer in layers
    )
    return len(layers) if all(whole) else 0
