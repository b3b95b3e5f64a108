"""Time of an iteration by phase, as sums of terms: products over a card's rate, bytes over its bandwidth and links."""

from __future__ import annotations

import math

from rlhf_ppo.models.costs.exchange import EXCHANGED_RECORDS, gathered_bytes, seconds_for
from rlhf_ppo.models.costs.setup import Setup
from rlhf_ppo.models.costs.shapes import Shape
from rlhf_ppo.models.costs.terms import TIMES, Term, term, total

OPERATORS = 30
"""Operators that the host starts for a layer of a decode step."""

STEP_BYTES = 32
"""Bytes of memory traffic of an optimizer step per weight: gradient twice, weight and two moments read and written."""


def times(setup: Setup) -> dict[str, list[Term]]:
    """Return the terms of each phase's seconds; reward functions that are no models, and saving, are not counted."""
    phases = {"generate": _generate(setup), "reference": _reference(setup)}
    if setup.rewards:
        tokens = setup.rows * (setup.row_tokens + 1)
        phases["score"] = [_products(setup, f"reward model {x.name}", x, tokens) for x in setup.rewards]
    phases["update"] = _update(setup)
    phases["optimizer steps"] = _steps(setup)
    return phases


def seconds(setup: Setup) -> float:
    """Return the seconds of an iteration."""
    return sum(total(terms) for terms in times(setup).values())


def _rate(setup: Setup) -> tuple[float, str]:
    card = setup.card
    peak = card.bf16 if setup.bf16 else card.fp32
    return peak * card.matmul_share, "flop/s"


def _bandwidth(setup: Setup) -> tuple[float, str]:
    return setup.card.bandwidth * setup.card.bandwidth_share, "bytes/s"


def _products(setup: Setup, what: str, shape: Shape, tokens: float, times: int = 1) -> Term:
    """Return the time of passes through the layers: 2 flop per weight and token, and attention over half the row."""
    attention = 2 * setup.row_tokens * shape.query_width * shape.layers
    each = 2 * shape.layer_matrices + attention
    return term(what, (times, TIMES), (tokens, "tokens"), (each, "flop"), over=_rate(setup))


def _output(setup: Setup, what: str, shape: Shape, tokens: float, times: int = 1) -> Term:
    each = 2 * shape.vocabulary * shape.width
    return term(what, (times, TIMES), (tokens, "tokens"), (each, "flop"), over=_rate(setup))


def _generate(setup: Setup) -> list[Term]:
    shape, rows = setup.policy, setup.rows
    steps = math.ceil(setup.response_tokens * rows / setup.slots)
    terms = [_products(setup, "prompts", shape, math.ceil(rows / setup.args.num_generations) * setup.prompt_tokens)]
    if setup.sharding != "none":
        within, size = setup.sharding == "hybrid", gathered_bytes(setup, shape)
        often = 1 if setup.gathers_whole else steps
        terms.append(seconds_for(setup, "gathering weights", size, often, within_node=within))
    moved = _read_each_step(setup)
    context = setup.prompt_tokens + setup.response_tokens / 2
    cache = setup.slots * context * shape.layers * shape.key_width * 2 * setup.compute_bytes
    reading = [
        term("decode steps: weights", (steps, "steps"), (moved, "bytes"), over=_bandwidth(setup)),
        term("decode steps: cache", (steps, "steps"), (cache, "bytes"), over=_bandwidth(setup)),
    ]
    tokens = rows * setup.response_tokens
    computing = [
        _products(setup, "decode steps: layers", shape, tokens),
        _output(setup, "decode steps: output layer", shape, tokens),
    ]
    calls = (steps, "steps"), (shape.layers, "layers"), (OPERATORS, "operators"), (setup.card.launch, "s")
    starting = [term("decode steps: starting operators", *calls)]
    ways = [reading, computing] if _graphs(setup) else [reading, computing, starting]
    if setup.on_cpu:
        return [*terms, *max(reading, computing, key=total), *starting]
    return [*terms, *max(ways, key=total), *_records(setup)]


def _graphs(setup: Setup) -> bool:
    """Return whether decode steps are CUDA graphs, which the host starts at once."""
    args = setup.args
    dynamic = args.max_turns > 1 or len(args.stop_strings) > 0 or setup.sharding != "none"
    return not setup.on_cpu and args.generation != "dynamic" and not dynamic


def _read_each_step(setup: Setup) -> float:
    """Return the bytes of weights that a decode step moves.

    An output layer that is gathered in float32 is rounded at each step: 4 bytes read, 2 written, 2 read.
    """
    shape, outer = setup.policy, setup.policy.vocabulary * setup.policy.width
    if not setup.bf16:
        return 4.0 * (shape.layer_matrices + outer)
    each = {"none": 2, "8bit": 1, "4bit": 0.56}[setup.args.quantization]
    return each * shape.layer_matrices + (2 if setup.has_copies else 8) * outer


def _records(setup: Setup) -> list[Term]:
    if setup.processes == 1:
        return []
    size = setup.args.rollout_batch_size * setup.response_tokens * EXCHANGED_RECORDS
    return [seconds_for(setup, "exchanging records", size)]


def _reference(setup: Setup) -> list[Term]:
    shape, tokens = setup.reference or setup.policy, setup.rows * setup.row_tokens
    terms = [
        _products(setup, "layers", shape, tokens),
        _output(setup, "output layer", shape, setup.rows * setup.response_tokens),
    ]
    if setup.value is not None:
        terms.append(_products(setup, "critic's layers", setup.value, tokens))
    if setup.critic == "adapter" or setup.args.recompute_logprobs:
        terms.append(_products(setup, "policy's layers", setup.policy, tokens))
    if setup.sharding != "none":
        passes, within = setup.passes(setup.rows), setup.sharding == "hybrid"
        gathering = seconds_for(setup, "gathering weights", gathered_bytes(setup, shape), passes, within_node=within)
        terms += _exposed(gathering, terms)
    return terms


def _exposed(exchange: Term, work: list[Term]) -> list[Term]:
    """Return what of an exchange is left when it runs beside products."""
    left = exchange.amount - total(work)
    how = f"{exchange.how} = {exchange.amount:.3g} s, beside {total(work):.3g} s of products"
    return [Term(f"{exchange.what}, beyond the products", left, how)] if left > 0 else []


def _update(setup: Setup) -> list[Term]:
    args, shape = setup.args, setup.policy
    again = int(args.gradient_checkpointing)
    passes = args.num_epochs * args.num_minibatches
    rows = passes * setup.minibatch_rows
    tokens, outputs = rows * setup.row_tokens, rows * setup.response_tokens
    # Forward, and backward to activations and, where trained, to weights; frozen weights need no second.
    trained = (3 if setup.adapter is None else 2) + again
    pass_outputs = setup.pass_rows(setup.minibatch_rows) * setup.response_tokens
    recomputed = int(pass_outputs * shape.vocabulary > 2**25)
    terms = [
        _products(setup, "layers", shape, tokens, trained),
        _output(setup, "output layer", shape, outputs, trained - again + recomputed),
    ]
    alone = args.critic_only_epochs * args.critic_only_minibatches * setup.minibatch_rows * setup.row_tokens
    if setup.value is not None:
        factor = 1 if args.critic_frozen == "trunk" else 3 + again
        terms.append(_products(setup, "critic's layers", setup.value, tokens + alone, factor))
    elif setup.critic == "adapter":
        terms.append(_products(setup, "critic's layers", shape, tokens + alone, 2 + again))
    elif alone:
        terms.append(_products(setup, "critic alone: layers", shape, alone))
    if setup.sharding != "none":
        terms += _exposed(_sharded_exchange(setup), list(terms))
    return terms


def _sharded_exchange(setup: Setup) -> Term:
    """Return the time of gathering weights twice and summing gradients once in each pass."""
    passes = setup.args.steps_per_rollout * setup.passes(setup.minibatch_rows)
    size = 2 * sum(gathered_bytes(setup, x) for x in (setup.policy, setup.value) if x is not None) + 4 * setup.trained
    within = seconds_for(
        setup, "gathering weights and summing gradients", size, passes, within_node=setup.sharding == "hybrid"
    )
    if setup.sharding != "hybrid" or setup.nodes == 1:
        return within
    outside = seconds_for(setup, "summing gradients over nodes", 4.0 * setup.trained, 2 * passes)
    return max(within, outside, key=lambda x: x.amount)


def _steps(setup: Setup) -> list[Term]:
    steps, shards = (setup.args.steps_per_rollout, "steps"), (setup.trained / setup.shards, "weights here")
    terms = [term("AdamW", steps, shards, (STEP_BYTES, "bytes"), over=_bandwidth(setup))]
    if changed := min(setup.copied, setup.trained):  # a critic may be frozen
        terms.append(term("rounding weights", steps, (changed, "weights"), (6, "bytes"), over=_bandwidth(setup)))
    if setup.processes > 1 and setup.sharding == "none":
        summing = 2 * setup.args.steps_per_rollout
        terms.append(seconds_for(setup, "summing gradients", 4.0 * setup.trained, summing))
    return terms
