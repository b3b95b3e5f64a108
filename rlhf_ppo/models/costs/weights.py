"""Weights, gradients and optimizer of one process: what it holds throughout, and what it gathers."""

from __future__ import annotations

from rlhf_ppo.models.costs.setup import Setup
from rlhf_ppo.models.costs.shapes import Shape
from rlhf_ppo.models.costs.terms import TIMES, Term, term

RECORD_BYTES = 60
"""Bytes of a rollout's records per token: ids, masks, draws, log-probs, values, rewards, advantages, returns."""

_BASE = {"none": 4.0, "8bit": 1.0, "4bit": 0.56}
_REFERENCE = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0, "4bit": 0.56}
"""Bytes of a weight; 4 bits with their scales."""


def held(setup: Setup) -> list[Term]:
    """Return what a process holds throughout: weights, optimizer, frozen models, records."""
    terms = _policy_weights(setup)
    if setup.value is not None:
        terms += _sharded(setup, "critic's weights", setup.value, 4)
    if setup.copied:
        terms.append(term("bfloat16 copy of trained matrices", (setup.copied, "weights"), (2, "bytes")))
    shards = (setup.shards, "processes") if setup.shards > 1 else None
    terms.append(term("AdamW's two moments", (setup.trained, "trained weights"), (8, "bytes"), over=shards))
    if setup.reference is not None:
        each = _REFERENCE[setup.args.reference_format(bf16=setup.bf16)]
        whole = each < 2
        terms += _sharded(setup, "reference's weights", setup.reference, each, whole=whole)
        if each == 4 and setup.has_copies:
            copied = (setup.reference.matrices, "weights")
            terms.append(term("bfloat16 copy of the reference's matrices", copied, (2, "bytes")))
    for judge in setup.rewards:
        terms += _sharded(setup, f"reward model {judge.name}", judge, setup.compute_bytes)
    tokens = setup.args.rollout_batch_size * (setup.prompt_tokens + setup.response_tokens)
    terms.append(term("records of the whole rollout", (tokens, "tokens"), (RECORD_BYTES, "bytes")))
    if setup.card.overhead:
        terms.append(term("libraries loaded at first use", (setup.card.overhead, "bytes")))
    return terms


def _policy_weights(setup: Setup) -> list[Term]:
    policy, adapter = setup.policy, setup.adapter
    each = _BASE[setup.args.quantization]
    # A frozen base is held in the format of products, if it is whole.
    base = 2 if adapter is not None and setup.has_copies else 4
    if each < 4:
        terms = [
            term("policy's layers, quantised", (policy.layer_matrices, "weights"), (each, "bytes")),
            term("policy's embeddings and output layer", (policy.root, "weights"), (base, "bytes")),
            term("policy's norms and biases", (policy.other, "weights"), (4, "bytes")),
        ]
    else:
        terms = _sharded(setup, "policy's weights", policy, base)
    if adapter is not None:
        number = adapter.parameters * (2 if setup.critic == "adapter" else 1)
        terms.append(term("adapter's weights", (number, "weights"), (4, "bytes")))
    return terms


def _sharded(setup: Setup, what: str, shape: Shape, each: float, *, whole: bool = False) -> list[Term]:
    """Return a model's weights: matrices are shared out, the few others stay whole, and in float32."""
    if whole or (setup.shards == 1 and each == 4):
        return [term(what, (shape.parameters, "weights"), (each, "bytes"))]
    shards = (setup.shards, "processes") if setup.shards > 1 else None
    return [
        term(what, (shape.matrices, "weights"), (each, "bytes"), over=shards),
        term(f"{what}: norms and biases", (shape.other, "weights"), (4, "bytes")),
    ]


def embedding_gradients(setup: Setup) -> list[Term]:
    """Return gradients that stay allocated between updates: those of embeddings without a tied output layer."""
    if setup.adapter is not None or not setup.policy.output:
        return []
    shards = (setup.shards, "processes") if setup.shards > 1 else None
    return [term("gradients of embeddings", (setup.policy.embeddings, "weights"), (4, "bytes"), over=shards)]


def gradients(setup: Setup) -> Term:
    """Return the gradients of all trained weights, or this process's share of them."""
    shards = (setup.shards, "processes") if setup.shards > 1 else None
    return term("gradients", (setup.trained, "trained weights"), (4, "bytes"), over=shards)


def gathered_weights(setup: Setup, shape: Shape, *, whole: bool = False) -> list[Term]:
    """Return weights that a sharded model gathers: outer ones in float32, layers in the format of products."""
    if setup.sharding == "none":
        return []
    outer = term("embeddings and output layer, gathered", (shape.root, "weights"), (4, "bytes"))
    if whole:
        every = term("layers, gathered", (shape.layer_matrices, "weights"), (setup.compute_bytes, "bytes"))
        return [outer, every]
    one = shape.layer_matrices / shape.layers
    # The layer that computes, the next one, and the buffer it is gathered into.
    return [outer, term("layers in flight", (3, TIMES), (one, "weights"), (setup.compute_bytes, "bytes"))]
