"""Activations: what layers and the output layer keep for the backward pass, and what they need while they compute.

Counted from what autograd saves in transformers' layers as they run here: the residual stream in float32, what norms
return once for all that read it and what linear layers write in the format of matrix products.
"""

from __future__ import annotations

import math
from typing import Literal

from rlhf_ppo.core.kernels.vocabulary_blocks import BLOCK_LOGITS, BLOCK_WORDS, CHUNK_LOGITS
from rlhf_ppo.models.costs.setup import Adapter, Setup
from rlhf_ppo.models.costs.shapes import Linear, Shape
from rlhf_ppo.models.costs.terms import Term, term

_SAMPLE = 2048
"""Words by which the largest logit is estimated under bfloat16."""


def layer_bytes(setup: Setup, shape: Shape, adapter: Adapter | None) -> dict[str, float]:
    """Return the bytes that one layer keeps of one token, by what they hold.

    Args:
        setup: the run.
        shape: the model's.
        adapter: what is trained; None: all weights.
    """
    size, width, inner = setup.compute_bytes, shape.width, shape.mlp_width
    trained = shape.linears if adapter is None else adapter.targets
    kept = {
        "inputs of norms": shape.norms * 4 * width,
        "normalized, before the norm's weight": 0 if shape.fused_norms or adapter else shape.norms * 4 * width,
        "inputs of linear layers after norms": size * width * _norms_read(shape, trained),
        "queries, keys, values, result of attention": _attention(setup, shape),
        "input of attention's last layer": size * shape.query_width * (shape.writer(attends=True) in trained),
        "MLP": size * inner * (3 if shape.gated else 1) + size * inner * (shape.writer(attends=False) in trained),
        "adapters": size * adapter.rank * len(adapter.targets) if adapter is not None else 0,
    }
    return {what: number for what, number in kept.items() if number}


def _norms_read(shape: Shape, trained: tuple[Linear, ...]) -> int:
    """Count the norms whose result is kept: once for all trained linear layers that read it."""
    return sum(any(x in trained for x in shape.readers(attends=attends)) for attends in (True, False))


def _plain_attention(setup: Setup) -> bool:
    """Return whether packed sequences attend by plain products, which keep the attention weights."""
    return setup.on_cpu and setup.bf16 and setup.row_tokens <= 1024


def _attention(setup: Setup, shape: Shape) -> float:
    size = setup.compute_bytes
    if _plain_attention(setup):
        return _queries_and_keys(setup, shape) + size * (shape.key_width + shape.heads * setup.row_tokens)
    return size * 2 * (shape.query_width + shape.key_width) + 4 * shape.heads


def _queries_and_keys(setup: Setup, shape: Shape) -> float:
    """Return the bytes of a token's queries and keys, which positions rotate in float32."""
    return (4 if shape.rotary else setup.compute_bytes) * (shape.query_width + shape.key_width)


def kept_by_layers(setup: Setup, shape: Shape, adapter: Adapter | None, tokens: int, whose: str = "") -> list[Term]:
    """Return what the layers keep of a pass until its backward pass; nothing where main memory keeps it."""
    if setup.args.offload_activations and not setup.on_cpu:
        return []
    layers = (shape.layers, "layers")
    if setup.args.gradient_checkpointing:
        each = {"inputs of layers": 4.0 * shape.width}
    else:
        each = layer_bytes(setup, shape, adapter)
    return [
        term(f"{whose}activations: {what}", layers, (tokens, "tokens"), (number, "bytes"))
        for what, number in each.items()
    ]


def recomputed_layer(setup: Setup, shape: Shape, adapter: Adapter | None, tokens: int) -> list[Term]:
    """Return what gradient checkpointing computes again, one layer at a time."""
    if not setup.args.gradient_checkpointing:
        return []
    each = sum(layer_bytes(setup, shape, adapter).values())
    return [term("activations of one layer, recomputed", (tokens, "tokens"), (each, "bytes"))]


def backward_work(setup: Setup, shape: Shape, tokens: int) -> Term:
    """Return the gradients of activations that are live while a layer's backward pass runs."""
    each = 2 * setup.compute_bytes * shape.mlp_width + 16 * shape.width
    return term("gradients of one layer's activations", (tokens, "tokens"), (each, "bytes"))


def forward_work(setup: Setup, shape: Shape, tokens: int, *, packed: bool = True) -> Term:
    """Return what one layer needs in a pass without gradients."""
    size = setup.compute_bytes
    mlp = size * shape.mlp_width * (3 if shape.gated else 2)
    attention = 2 * _queries_and_keys(setup, shape)
    each = 24 * shape.width + max(mlp, attention)
    if packed and _plain_attention(setup):
        # Queries and keys, what is made of them for each query head, scores, their softmax and its rounded copy.
        attends = _queries_and_keys(setup, shape) + 2 * shape.key_width + 6 * shape.query_width
        each = max(each, 6 * shape.width + attends + 10 * shape.heads * setup.row_tokens)
    return term("activations of one layer", (tokens, "tokens"), (each, "bytes"))


def output_work(setup: Setup, shape: Shape, tokens: int, moment: Literal["read", "forward", "backward"]) -> list[Term]:
    """Return what the output layer needs for log-probs of tokens: without gradients, in training, and in backward.

    Logits exist in chunks of :data:`CHUNK_LOGITS`; on a CPU in blocks within the chunk.
    """
    size, vocabulary = setup.compute_bytes, shape.vocabulary
    rows = min(tokens, max(CHUNK_LOGITS // vocabulary, 1))
    words = min(vocabulary, max(BLOCK_LOGITS // rows, BLOCK_WORDS)) if setup.on_cpu else vocabulary
    kept = moment != "read" and rows == tokens
    terms = [term("states before the output layer", (tokens, "tokens"), (8 * shape.width, "bytes"))]
    if kept:
        terms.append(term("exponentials of logits", (tokens, "tokens"), (vocabulary, "words"), (size, "bytes")))
    # The block before is still there when the next one is computed; bfloat16 logits become float32 exponentials.
    live = words if kept else min(2 * words, vocabulary * math.ceil(tokens / rows))
    each = (0 if kept else size) if moment == "backward" or not setup.bf16 else (4 if kept else 5)
    block = term("blocks of logits", (rows, "tokens"), (live, "words"), (each, "bytes"))
    if not setup.bf16:
        return [*terms, block]
    if moment == "backward":
        what = "products of a block" if setup.has_copies else "weights and products of a block"
        products = term(what, (words, "words"), (shape.width, "wide"), (2 + _rounds(setup), "bytes"))
        return [*terms, block, products]
    some = min(_SAMPLE, vocabulary)
    each = (2 + 3 * _rounds(setup)) * shape.width + 2 * rows
    guess = term("estimate of the largest logits", (some, "words"), (each, "bytes"))
    return [*terms, max(block, guess, key=lambda x: x.amount)]


def _rounds(setup: Setup) -> int:
    """Return the bytes of an output weight's rounded copy, which a pass makes of one that is gathered in float32."""
    return 0 if setup.has_copies else 2


def largest_matrix(shape: Shape) -> int:
    """Return the parameters of a layer's largest linear layer."""
    return max(math.prod((x.inputs, x.outputs)) for x in shape.linears)
