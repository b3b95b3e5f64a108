"""Memory of one process by phase, as sums of terms: what is held throughout, and what a phase adds at its peak."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rlhf_ppo.models.costs.activations import (
    backward_work,
    forward_work,
    kept_by_layers,
    largest_matrix,
    output_work,
    recomputed_layer,
)
from rlhf_ppo.models.costs.setup import Setup
from rlhf_ppo.models.costs.shapes import Shape
from rlhf_ppo.models.costs.terms import TIMES, Term, term, total
from rlhf_ppo.models.costs.weights import embedding_gradients, gathered_weights, gradients, held

SCORED_AT_ONCE = 32
"""Texts that a reward model reads at once."""


def memory(setup: Setup) -> dict[str, list[Term]]:
    """Return the terms of each phase's peak, of the process that needs most.

    Returns:
        Phase -> its terms, those held throughout first; their sum is the peak.
    """
    always = held(setup)
    idle = always + (embedding_gradients(setup) if setup.trains else [])
    phases = {"generate": idle + _generate(setup), "reference": idle + _reference(setup)}
    if setup.rewards:
        phases["score"] = idle + _score(setup)
    if not setup.trains:
        return phases
    moment, work = _update(setup)
    phases[f"update ({moment})"] = always + work
    phases["optimizer step"] = [*always, gradients(setup)]
    return phases


def peaks(setup: Setup) -> dict[str, float]:
    """Return the bytes of each phase's peak."""
    return {phase: total(terms) for phase, terms in memory(setup).items()}


def peak(setup: Setup) -> float:
    """Return the bytes that one process needs."""
    return max(peaks(setup).values())


def usable(setup: Setup) -> float:
    """Return the bytes that a process may count on: of its GPU, or its share of the machine."""
    share = setup.nodes / setup.processes if setup.on_cpu else 1
    return setup.card.memory * setup.card.usable * share


def fits(setup: Setup) -> bool:
    """Return whether a process has the memory that it needs."""
    return peak(setup) <= usable(setup)


def _generate(setup: Setup) -> list[Term]:
    shape, size, rows = setup.policy, setup.compute_bytes, setup.slots
    room = setup.prompt_tokens + setup.response_tokens
    per_token = (shape.layers, "layers"), (shape.key_width, "wide"), (2 * size, "bytes")
    terms = gathered_weights(setup, shape, whole=setup.gathers_whole)
    if setup.bf16 and setup.sharding != "none":
        terms.append(term("output layer in bfloat16", (shape.vocabulary, "words"), (shape.width, "wide"), (2, "bytes")))
    terms.append(term("cache", (rows, "responses"), (room, "tokens"), *per_token))
    if setup.on_cpu and setup.bf16:
        # Plain products in float32: keys and values as they are and for every query head, and scaled keys.
        repeated = 8 * shape.query_width * (shape.key_width < shape.query_width)
        each = repeated + 4 * shape.query_width + 8 * shape.key_width
    else:
        each = 2 * size * shape.key_width
    moments = [
        forward_work(setup, shape, math.ceil(rows / setup.args.num_generations) * setup.prompt_tokens, packed=False),
        term("logits and probabilities", (rows, "responses"), (shape.vocabulary, "words"), (8, "bytes")),
        term("attention of one layer", (rows, "responses"), (room, "tokens"), (each, "bytes")),
    ]
    return [*terms, max(moments, key=lambda x: x.amount)]


def _reference(setup: Setup) -> list[Term]:
    shape, rows = setup.reference or setup.policy, setup.pass_rows(setup.rows)
    layers = [forward_work(setup, shape, rows * setup.row_tokens)]
    output = output_work(setup, shape, rows * setup.response_tokens, "read")
    terms = [*gathered_weights(setup, shape), *max(layers, output, key=total)]
    if setup.value is not None:
        own = [*gathered_weights(setup, setup.value), forward_work(setup, setup.value, rows * setup.row_tokens)]
        terms = max(terms, own, key=total)
    return terms


def _score(setup: Setup) -> list[Term]:
    """Return what the reward model that needs most needs."""
    tokens = min(setup.rows, SCORED_AT_ONCE) * (setup.row_tokens + 1)
    each = [[*gathered_weights(setup, x), forward_work(setup, x, tokens, packed=False)] for x in setup.rewards]
    return max(each, key=total)


def _update(setup: Setup) -> tuple[str, list[Term]]:
    """Return the moment of a pass at which most memory is in use, and what is in use beside what is always held."""
    moments = _moments(setup)
    name = max(moments, key=lambda moment: total(moments[moment]))
    return name, moments[name]


def _moments(setup: Setup) -> Mapping[str, list[Term]]:
    shape, adapter, rows = setup.policy, setup.adapter, setup.pass_rows(setup.minibatch_rows)
    tokens, outputs = rows * setup.row_tokens, rows * setup.response_tokens
    again = setup.passes(setup.minibatch_rows) > 1  # then gradients of the passes before are there
    before = [gradients(setup)] if again else embedding_gradients(setup)
    common = [*before, *gathered_weights(setup, shape), _ends(setup, shape, tokens)]
    kept = kept_by_layers(setup, shape, adapter, tokens)
    forward, backward = (output_work(setup, shape, outputs, moment) for moment in ("forward", "backward"))
    of_output = []
    if adapter is None:
        of_output = [term("gradient of the output layer", (shape.vocabulary * shape.width, "weights"), (4, "bytes"))]
    critic, of_critic = _critic(setup, tokens)
    layers = [
        *_left_or_done(setup, kept, first=not again),
        *recomputed_layer(setup, shape, adapter, tokens),
        backward_work(setup, shape, tokens),
        *_new_gradient(setup, shape),
    ]
    after_output = of_output if not again or setup.sharding != "none" else []
    moments = {
        "output layer, forward": [*common, *kept, *forward],
        "output layer, backward": [*common, *kept, *backward, *of_output, *of_critic],
        "layers, backward": [*common, *layers, *after_output, *of_critic],
    }
    if critic:
        logits = [x for x in forward if x.what == "exponentials of logits"]
        moments["critic, backward"] = [*common, *kept, *logits, *critic]
    if adapter is None and setup.sharding != "none":
        # A gradient, and the buffer from which it is summed.
        whole = term("whole gradients of what is gathered", (2, TIMES), (shape.root, "weights"), (4, "bytes"))
        moments["embeddings, backward"] = [gradients(setup), *gathered_weights(setup, shape), whole]
    return moments


def _left_or_done(setup: Setup, kept: list[Term], *, first: bool) -> list[Term]:
    """Return what layers keep before backward, or the gradients that replace it one by one, whichever is more."""
    if setup.adapter is not None or not first:
        return kept
    shards = (setup.shards, "processes") if setup.shards > 1 else None
    layers = setup.policy.layers
    each = setup.policy.layer_matrices / layers
    done = [term("gradients of other layers", (layers - 1, "layers"), (each, "weights"), (4, "bytes"), over=shards)]
    return max(kept, done, key=total)


def _ends(setup: Setup, shape: Shape, tokens: int) -> Term:
    """Return what is kept outside of the layers: the embeddings' result, and the last norm's input and result."""
    each = (8 + setup.compute_bytes) * shape.width
    return term("embeddings and last norm", (tokens, "tokens"), (each, "bytes"))


def _new_gradient(setup: Setup, shape: Shape) -> list[Term]:
    """Return a new gradient before it is added to what is there: the largest matrix's, or a gathered layer's."""
    if setup.adapter is not None:
        return []
    if setup.sharding != "none":
        one = shape.layer_matrices / shape.layers
        return [term("whole gradients of a layer", (one, "weights"), (setup.compute_bytes + 4, "bytes"))]
    each = setup.compute_bytes + (4 if setup.bf16 else 0)
    return [term("new gradient of the largest matrix", (largest_matrix(shape), "weights"), (each, "bytes"))]


def _critic(setup: Setup, tokens: int) -> tuple[list[Term], list[Term]]:
    """Return what a critic with a pass of its own needs in its backward pass, and which gradients stay after it."""
    if setup.critic == "adapter":
        whose, shape, adapter = "critic's ", setup.policy, setup.adapter
    elif setup.value is not None and setup.args.critic_frozen != "trunk":
        whose, shape, adapter = "critic's ", setup.value, None
    else:
        return [], []
    kept = kept_by_layers(setup, shape, adapter, tokens, whose)
    work = [*recomputed_layer(setup, shape, adapter, tokens), backward_work(setup, shape, tokens)]
    work.append(_ends(setup, shape, tokens))
    after = []
    if setup.value is not None and setup.passes(setup.minibatch_rows) == 1:
        shards = (setup.shards, "processes") if setup.shards > 1 else None
        after = [term("gradients of the critic", (setup.trained_value, "weights"), (4, "bytes"), over=shards)]
    return [*kept, *gathered_weights(setup, shape), *work], after
