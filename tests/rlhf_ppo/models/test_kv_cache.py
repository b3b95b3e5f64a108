"""The preallocated cache holds what transformers' own growing one holds."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_ppo.models.forward.kv_cache import PreallocatedLayer, preallocated_cache


@given(st.integers(0, 1000), st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_updates_and_leaving_rows_as_in_transformers_layer(seed, steps):
    generator = torch.Generator().manual_seed(seed)
    rows, layers = 6, (PreallocatedLayer(sum(steps)), DynamicLayer())
    for layer in layers:
        layer.batch_select_indices(torch.tensor([0]))  # nothing is in it yet
    for step in steps:
        keys, values = torch.randn(2, rows, 2, step, 4, generator=generator)
        got, expected = (layer.update(keys.clone(), values.clone()) for layer in layers)
        for a, b in zip((*got, layers[0].keys), (*expected, layers[1].keys), strict=True):
            assert torch.equal(a, b)
        assert layers[0].get_seq_length() == layers[1].get_seq_length()
        keep = (torch.rand(rows, generator=generator) < 0.7).nonzero().squeeze(-1)
        if len(keep):
            rows = len(keep)
            for layer in layers:
                layer.batch_select_indices(keep)
            assert torch.equal(layers[0].keys, layers[1].keys) and torch.equal(layers[0].values, layers[1].values)


def test_nothing_is_copied_as_the_cache_grows():
    layer = PreallocatedLayer(8)
    first, _ = layer.update(*torch.randn(2, 3, 2, 5, 4))
    for _ in range(3):
        keys, _ = layer.update(*torch.randn(2, 3, 2, 1, 4))
        assert keys.data_ptr() == first.data_ptr()
    assert keys.shape == (3, 2, 8, 4)


def test_only_ordinary_layers_are_preallocated():
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    ordinary = preallocated_cache(LlamaConfig(**sizes), 9)
    assert [type(layer) for layer in ordinary.layers] == [PreallocatedLayer] * 2
    windows = preallocated_cache(MistralConfig(sliding_window=4, **sizes), 9)
    assert all(isinstance(layer, DynamicSlidingWindowLayer) for layer in windows.layers)
    mixed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    both = preallocated_cache(Qwen2Config(**mixed, **sizes), 9)
    assert [type(layer) for layer in both.layers] == [PreallocatedLayer, DynamicSlidingWindowLayer]
