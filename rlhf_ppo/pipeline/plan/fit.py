"""Fit: try settings that save memory, and choose those under which an iteration takes least time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from rlhf_ppo.config.arguments.plan import PlanArgs
from rlhf_ppo.models.costs.choice import choose_sharding
from rlhf_ppo.models.costs.setup import lora_adapter
from rlhf_ppo.pipeline.plan.plan import Plan

LORA_RANK = 16
"""Rank of the adapter that is tried where no setting makes all weights fit."""

MOST_GPUS, IN_A_NODE = 1024, 8
SMALLEST_PASS = 256
"""Tokens of the smallest microbatch that is tried."""


def find_fit(found: Plan) -> Plan | None:
    """Return the fastest plan that fits and trains what ``found`` trains, else with LoRA, QLoRA, else None."""
    args = found.args
    tries: list[dict[str, Any]] = [{}]
    if args.lora_rank is None and args.value_model is None:
        tries.append({"lora_rank": LORA_RANK, "reference_dtype": "auto"})
        if args.sharding == "auto" and not found.setup.on_cpu:  # bitsandbytes needs a GPU
            tries.append({**tries[-1], "quantization": "4bit"})
    for adapter in tries:
        fitting = [some for some in try_settings(found, adapter) if some.fits]
        if fitting:
            return min(fitting, key=lambda some: (round(some.seconds, 3), len(changes(args, some.args))))
    return None


def try_settings(found: Plan, adapter: dict[str, Any]) -> Iterator[Plan]:
    """Yield plans for every combination of settings that save memory, together with those of an ``adapter``."""
    args = found.args
    ways: dict[str, list[Any]] = {
        "sharding": [args.sharding],
        "gradient_checkpointing": sorted({args.gradient_checkpointing, True}),
        "microbatch_tokens": _passes(found),
    }
    shareable = args.quantization == "none" and "quantization" not in adapter
    if args.sharding == "auto" and args.processes > 1 and shareable:
        ways["sharding"] += ["full"] + ["hybrid"] * (args.nodes > 1)
    if args.lora_rank is None and not adapter and args.reference_format(bf16=found.setup.bf16) == "float32":
        ways["reference_dtype"] = [args.reference_dtype, "bfloat16"]
    for values in itertools.product(*ways.values()):
        yield replan(found, **dict(zip(ways, values, strict=True)), **adapter)


def _passes(found: Plan) -> list[int | None]:
    """Return sizes of microbatches to try: the given one, and halves of it."""
    given = found.setup.microbatch_tokens
    halves = [size for k in range(1, 8) if (size := given // 2**k) >= SMALLEST_PASS]
    return [found.args.microbatch_tokens, *halves]


def replan(found: Plan, **settings: Any) -> Plan:
    """Return the plan of the same models under other settings; a new adapter takes the reference's place."""
    args = replace(found.args, **settings)
    setup = replace(found.setup, args=args, processes=args.processes, nodes=args.nodes)
    if args.lora_rank is not None and setup.adapter is None:
        adapter = lora_adapter(setup.policy, args.lora_rank, args.lora_target_modules)
        setup = replace(setup, adapter=adapter, reference=None)
    return Plan(args, choose_sharding(setup))


def changes(before: PlanArgs, after: PlanArgs) -> dict[str, Any]:
    """Return the settings in which two plans differ."""
    return {
        field.name: getattr(after, field.name)
        for field in fields(PlanArgs)
        if getattr(before, field.name) != getattr(after, field.name)
    }


def more_gpus(found: Plan) -> Plan | None:
    """Return a plan that fits on more GPUs of this kind, sharded and in the smallest passes; None: not on 1024."""
    least = {"sharding": "full", "gradient_checkpointing": True, "microbatch_tokens": SMALLEST_PASS}
    args = found.args
    if args.quantization != "none":
        return None
    gpus = 2 * args.processes
    while gpus <= MOST_GPUS:
        nodes = next(n for n in range(max(-(-gpus // IN_A_NODE), args.nodes), gpus + 1) if gpus % n == 0)
        tried = replan(found, **least, gpus=gpus, nodes=nodes)
        if tried.fits:
            return find_fit(replan(found, gpus=gpus, nodes=nodes)) or tried
        gpus *= 2
    return None


MOST_DOUBLINGS = 16


def growth(found: Plan) -> dict[str, tuple[int, int, str] | None]:
    """Return for each size of a run that fits: the largest double that fits, the next one, and the phase it breaks.

    Sizes are responses a rollout and tokens a response; None: it never breaks, whatever doubles.
    """
    lengths = found.setup.response_tokens

    def responses(factor: int) -> Plan:
        size, horizon = factor * found.args.rollout_batch_size, found.args.kl_horizon
        # A controller's horizon grows along: it must be at least a rollout.
        return replan(
            found,
            rollout_batch_size=size,
            kl_horizon=horizon if found.args.kl_target is None else max(horizon, float(size)),
        )

    def tokens(factor: int) -> Plan:
        longer = replan(found, max_new_tokens=factor * found.args.max_new_tokens, response_tokens=None)
        return Plan(longer.args, choose_sharding(replace(longer.setup, response_tokens=factor * lengths)))

    return {
        "rollout_batch_size": _largest(responses, found.args.rollout_batch_size),
        "response_tokens": _largest(tokens, lengths),
    }


def _largest(grown: Callable[[int], Plan], size: int) -> tuple[int, int, str] | None:
    factors = [2**k for k in range(1, MOST_DOUBLINGS + 1)]
    for factor in factors:
        if not (tried := grown(factor)).fits:
            return factor // 2 * size, factor * size, tried.first_to_break
    return None
