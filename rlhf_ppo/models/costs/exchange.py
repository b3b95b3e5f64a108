"""Exchange: the bytes that processes send each other in an update and for decoding, beside the least that they must."""

from __future__ import annotations

from rlhf_ppo.models.costs.setup import Setup
from rlhf_ppo.models.costs.shapes import Shape
from rlhf_ppo.models.costs.terms import TIMES, Term, term

EXCHANGED_RECORDS = 50
"""Bytes of a rollout's records that are exchanged, per token."""


def gathered_bytes(setup: Setup, shape: Shape) -> int:
    """Return the bytes of a model's gathered weights: outer ones in float32, layers in the format of products."""
    return setup.compute_bytes * shape.layer_matrices + 4 * shape.root


def sent_in_update(setup: Setup) -> list[Term]:
    """Return what one process sends in an update; nothing if it is alone."""
    if setup.processes == 1:
        return []
    steps, gradients = (setup.args.steps_per_rollout, "optimizer steps"), (setup.trained, "trained weights")
    if setup.sharding == "none":
        return [term("sum of gradients", steps, gradients, (4, "bytes"), _share(2, setup.processes))]
    passes = (setup.args.steps_per_rollout * setup.passes(setup.minibatch_rows), "passes")
    gathered = sum(gathered_bytes(setup, x) for x in (setup.policy, setup.value) if x is not None)
    part = _share(1, setup.shards)
    sent = [
        term("weights, gathered forward and backward", passes, (2, TIMES), (gathered, "bytes"), part),
        term("sum of gradients, shared out", passes, gradients, (4, "bytes"), part),
    ]
    if setup.sharding == "hybrid":
        each = (setup.trained / setup.shards, "trained weights here")
        sent.append(term("sum of gradients over nodes", passes, each, (4, "bytes"), _share(2, setup.nodes)))
    return sent


def least_in_update(setup: Setup) -> Term:
    """Return the least that a process must send: its part of the sums of gradients, and of the new weights."""
    steps = (setup.args.steps_per_rollout, "optimizer steps")
    return term("least", steps, (setup.trained, "trained weights"), (4, "bytes"), _share(2, setup.processes))


def seconds_for(setup: Setup, what: str, size: float, times: float = 1.0, *, within_node: bool = False) -> Term:
    """Return the time of ``times`` collectives in which each process gets all of ``size`` bytes, at the slowest link.

    Args:
        setup: the run.
        what: the term's name.
        size: bytes of the whole.
        times: how often; a sum on every process counts twice.
        within_node: no byte leaves a node.
    """
    local = setup.processes // setup.nodes
    inside = term(
        what,
        (times, TIMES),
        (size, "bytes"),
        _share(1, local),
        over=(setup.card.link * setup.card.link_share, "bytes/s in a node"),
    )
    if within_node or setup.nodes == 1:
        return inside
    between = term(
        what,
        (times, TIMES),
        (size, "bytes"),
        _share(1, setup.nodes),
        over=(setup.links * setup.card.link_share, "bytes/s between nodes"),
    )
    return max(inside, between, key=lambda x: x.amount)


def _share(times: int, processes: int) -> tuple[float, str]:
    parts = f"{processes - 1}/{processes}"
    return times * (processes - 1) / processes, f"({parts})" if times == 1 else f"({times} x {parts})"
