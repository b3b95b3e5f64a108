"""Print a plan: tables of memory and time, what breaks first, what makes it fit, and the arithmetic."""

from __future__ import annotations

import json
import shlex
from typing import Any

from rlhf_ppo.config.arguments.plan import PlanArgs
from rlhf_ppo.models.costs.exchange import least_in_update, sent_in_update
from rlhf_ppo.models.costs.terms import Term, total
from rlhf_ppo.models.costs.weights import held
from rlhf_ppo.pipeline.plan.fit import changes, find_fit, growth, more_gpus
from rlhf_ppo.pipeline.plan.plan import Plan, plan
from rlhf_ppo.runtime.logs.progress import short_count

GB = 1e9


def plan_command(args: PlanArgs) -> None:
    """Run the `plan` command."""
    found = plan(args)
    print(json.dumps(facts(found), indent=2) if args.json else text(found))


def text(found: Plan) -> str:
    """Return the plan in words and tables."""
    parts = [_head(found), _memory_table(found), _time_table(found), _exchange(found), verdict(found)]
    if found.args.explain:
        parts.append(_arithmetic(found))
    return "\n\n".join(part for part in parts if part)


def facts(found: Plan) -> dict[str, Any]:
    """Return the plan's numbers, for JSON."""
    setup = found.setup

    def listed(phases: dict[str, list[Term]]) -> dict[str, Any]:
        return {
            phase: {"total": total(terms), "terms": [term._asdict() for term in terms]}
            for phase, terms in phases.items()
        }

    fitting = None if found.fits else find_fit(found)
    return {
        "model": setup.policy.name,
        "parameters": setup.policy.parameters,
        "trained": setup.trained,
        "card": setup.card.name,
        "processes": setup.processes,
        "nodes": setup.nodes,
        "sharding": setup.sharding,
        "memory_bytes": listed(found.memory),
        "usable_bytes": found.usable,
        "fits": found.fits,
        "breaks_first": found.first_to_break,
        "grows_to": growth(found) if found.fits else None,
        "fits_with": None if fitting is None else changes(found.args, fitting.args),
        "seconds": listed(found.times),
        "sent_bytes": total(sent_in_update(setup)),
        "least_sent_bytes": least_in_update(setup).amount,
    }


def _head(found: Plan) -> str:
    setup, args = found.setup, found.args
    shape, card = setup.policy, setup.card
    trained = "" if setup.adapter is None else f", {short_count(setup.trained)} of them trained"
    where = f"{setup.processes} x {card.name}" + (f" on {setup.nodes} nodes" if setup.nodes > 1 else "")
    spread = f", sharding={setup.sharding}" if setup.processes > 1 else ""
    if setup.sharding != "none":
        spread += f" (decoding gathers {'all weights' if setup.gathers_whole else 'a layer at a time'})"
    long = f"{setup.response_tokens} tokens to prompts of {setup.prompt_tokens}"
    rows = {
        "model": f"{shape.name}, {shape.parameters:,} parameters{trained}, {setup.critic} critic",
        "on": f"{where} ({card.memory / GB:.3g} GB; {card.source})",
        "with": f"{'bf16' if setup.bf16 else 'fp32'} products{spread}",
        "iteration": f"{args.rollout_batch_size} responses of {long}, {args.steps_per_rollout} optimizer steps",
    }
    return "\n".join(f"{name:<10} {row}" for name, row in rows.items())


def _memory_table(found: Plan) -> str:
    usable = found.usable / GB
    lines = [f"{'GB of memory, one process':<38}{'held':>8}{'added':>9}{'peak':>9}{'of ' + format(usable, '.3g'):>10}"]
    for phase, terms in found.memory.items():
        peak = total(terms)
        share = peak / found.usable
        numbers = f"{found.held / GB:>8.2f}{(peak - found.held) / GB:>9.2f}{peak / GB:>9.2f}{share:>9.0%} "
        lines.append(f"  {phase:<36}{numbers}{'too much' if share > 1 else ''}".rstrip())
    return "\n".join(lines)


def _time_table(found: Plan) -> str:
    lines = [f"{'seconds of an iteration':<38}{_short(found.seconds):>8}"]
    for phase, terms in found.times.items():
        most = max(terms, key=lambda x: x.amount)
        lines.append(f"  {phase:<36}{_short(total(terms)):>8}   most of it: {most.what}")
    return "\n".join(lines)


def _exchange(found: Plan) -> str:
    sent = total(sent_in_update(found.setup))
    if not sent:
        return ""
    least = least_in_update(found.setup).amount
    return f"sent by a process in an update: {_short(sent / GB)} GB, at least {_short(least / GB)} GB"


def verdict(found: Plan) -> str:
    """Say what breaks first, and which settings make it fit."""
    phase = found.first_to_break
    most = sorted(found.memory[phase], key=lambda x: -x.amount)[:3]
    parts = ", ".join(f"{x.what} {_short(x.amount / GB)} GB" for x in most)
    need = f"{phase} needs {_short(found.peak / GB)} GB of {_short(found.usable / GB)} GB, most of it {parts}"
    if found.fits:
        return f"fits. What breaks first when it grows: {need}.\n{_growth(found)}"
    said = f"does not fit: {need}.\n"
    fitting = find_fit(found)
    if fitting is None and not found.setup.on_cpu:
        fitting, said = more_gpus(found), said + "No setting makes it fit here.\n"
    if fitting is None:
        return f"{said}Take a smaller model, or a card with more memory."
    changed = changes(found.args, fitting.args)
    if fitting.setup.processes > 1:
        changed["sharding"] = fitting.setup.sharding
    adapter = ", which trains an adapter instead of all weights" if "lora_rank" in changed else ""
    cost = f"{_short(fitting.peak / GB)} GB, {_short(fitting.seconds)} s an iteration"
    return f"{said}fits with {_flags(changed)}{adapter}: {cost}."


def _growth(found: Plan) -> str:
    """Say how far the run may grow, size by size."""
    words = {
        "rollout_batch_size": "responses a rollout",
        "response_tokens": "tokens a response, if the model reads as many",
    }
    lines = [
        f"fits with up to {limit[0]:,} {words[size]}; at {limit[1]:,}, {limit[2]} breaks"
        for size, limit in growth(found).items()
        if limit is not None
    ]
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _flags(settings: dict[str, Any]) -> str:
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in settings.items()]
    return shlex.join(" ".join(words).split())


def _arithmetic(found: Plan) -> str:
    always = held(found.setup)
    lines = _written("held throughout", always, "GB", GB)
    for phase, terms in found.memory.items():
        lines += _written(f"added in {phase}", terms[len(always) :], "GB", GB)
    for phase, terms in found.times.items():
        lines += _written(f"time of {phase}", terms, "s", 1.0)
    sent = sent_in_update(found.setup)
    if sent:
        lines += _written("sent by a process in an update", sent, "GB", GB)
        lines += _written("the least that it must send", [least_in_update(found.setup)], "GB", GB)
    return "\n".join(lines)


def _written(title: str, terms: list[Term], unit: str, scale: float) -> list[str]:
    lines = [f"  {x.amount / scale:>10.4g} {unit}  {x.what} = {x.how}" for x in terms]
    return [f"{title}: {total(terms) / scale:.4g} {unit}", *lines]
