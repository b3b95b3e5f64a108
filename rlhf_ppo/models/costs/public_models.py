"""Shapes of public models by hub id, so that plans need neither a download nor a network."""

from __future__ import annotations

from typing import Any

_GPT2 = {"vocab_size": 50257, "n_positions": 1024}
_QWEN = {"max_position_embeddings": 32768, "vocab_size": 152064}
_LLAMA = {"max_position_embeddings": 131072, "vocab_size": 128256, "num_key_value_heads": 8}


def _gpt2(width: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    return "gpt2", {**_GPT2, "n_embd": width, "n_layer": layers, "n_head": heads}


def _decoder(
    kind: str, shared: dict[str, Any], width: int, layers: int, heads: int, inner: int, **more: Any
) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return kind, {**shared, **sizes, "intermediate_size": inner, "tie_word_embeddings": False, **more}


_SMALL = {"vocab_size": 151936, "tie_word_embeddings": True, "num_key_value_heads": 2}

PUBLIC_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "Qwen/Qwen2.5-0.5B": _decoder("qwen2", _QWEN, 896, 24, 14, 4864, **_SMALL),
    "Qwen/Qwen2.5-1.5B": _decoder("qwen2", _QWEN, 1536, 28, 12, 8960, **_SMALL),
    "Qwen/Qwen2.5-3B": _decoder("qwen2", _QWEN, 2048, 36, 16, 11008, **_SMALL),
    "Qwen/Qwen2.5-7B": _decoder("qwen2", _QWEN, 3584, 28, 28, 18944, num_key_value_heads=4),
    "Qwen/Qwen2.5-14B": _decoder("qwen2", _QWEN, 5120, 48, 40, 13824, num_key_value_heads=8),
    "Qwen/Qwen2.5-32B": _decoder("qwen2", _QWEN, 5120, 64, 40, 27648, num_key_value_heads=8),
    "Qwen/Qwen2.5-72B": _decoder("qwen2", _QWEN, 8192, 80, 64, 29568, num_key_value_heads=8),
    "meta-llama/Llama-3.2-1B": _decoder("llama", _LLAMA, 2048, 16, 32, 8192, tie_word_embeddings=True),
    "meta-llama/Llama-3.1-8B": _decoder("llama", _LLAMA, 4096, 32, 32, 14336),
    "meta-llama/Llama-3.1-70B": _decoder("llama", _LLAMA, 8192, 80, 64, 28672),
}
"""Hub id -> architecture and what its config.json there sets (read in November 2026); -Instruct has the same shape."""


def public_config(name: str) -> tuple[str, dict[str, Any]] | None:
    """Return architecture and settings of a public model, or None if it is not in the table."""
    return PUBLIC_MODELS.get(name.removesuffix("-Instruct"))
