"""Weights, gradients and optimizer of one process: what it holds throughout, and what it gathers or rounds."""

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
    shards = (setup.shards, "processes") if setup.shards > 1 else None
    terms.append(term("AdamW's two moments", (setup.trained, "trained weights"), (8, "bytes"), over=shards))
    if setup.reference is not None:
        each = _REFERENCE[setup.args.reference_format(bf16=setup.bf16)]
        whole = each < 2
        terms += _sharded(setup, "reference's weights", setup.reference, each, whole=whole)
    terms += [term(f"reward model {x.name}", (x.parameters, "weights"), (4, "bytes")) for x in setup.rewards]
    tokens = setup.args.rollout_batch_size * (setup.prompt_tokens + setup.response_tokens)
    terms.append(term("records of the whole rollout", (tokens, "tokens"), (RECORD_BYTES, "bytes")))
    if setup.card.overhead:
        terms.append(term("libraries loaded at first use", (setup.card.overhead, "bytes")))
    return terms


def _policy_weights(setup: Setup) -> list[Term]:
    policy, adapter = setup.policy, setup.adapter
    each = _BASE[setup.args.quantization]
    if each < 4:
        rest = policy.parameters - policy.layer_matrices
        terms = [term("policy's layers, quantised", (policy.layer_matrices, "weights"), (each, "bytes"))]
        terms.append(term("policy's other weights", (rest, "weights"), (4, "bytes")))
    else:
        terms = _sharded(setup, "policy's weights", policy, 4)
    if adapter is not None:
        number = adapter.parameters * (2 if setup.critic == "adapter" else 1)
        terms.append(term("adapter's weights", (number, "weights"), (4, "bytes")))
    return terms


def _sharded(setup: Setup, what: str, shape: Shape, each: float, *, whole: bool = False) -> list[Term]:
    """Return a model's weights: matrices are shared out, the few others stay whole."""
    if setup.shards == 1 or whole:
        return [term(what, (shape.parameters, "weights"), (each, "bytes"))]
    matrices = shape.parameters - shape.other
    return [
        term(what, (matrices, "weights"), (each, "bytes"), over=(setup.shards, "processes")),
        term(f"{what}: norms and biases", (shape.other, "weights"), (each, "bytes")),
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


def rounded_weights(setup: Setup) -> list[Term]:
    """Return the working copy in bfloat16 that autocast makes of a replicated policy's trained layers."""
    if not setup.bf16 or setup.sharding != "none" or setup.adapter is not None:
        return []
    return [term("bfloat16 copy of the policy's layers", (setup.policy.layer_matrices, "weights"), (2, "bytes"))]


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
