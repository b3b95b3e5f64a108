"""Compilation: decide by measurement whether updates run compiled layers, and do without them if they fail."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.runtime.processes.group import ProcessGroup
from rlhf_ppo.training.gradients import clear_gradients

Result = TypeVar("Result")

WORTH_A_TRY_S = 120.0
"""Compiling takes from a few seconds to a minute: it is not tried where the updates to come take less than this."""


def computed(model: ActorCritic, compute: Callable[[], Result]) -> Result:
    """Return what ``compute`` returns, which adds gradients to none; if compiled layers fail, warn and use plain ones.

    Args:
        model: its ``compiled`` becomes False if they fail.
        compute: reads it.
    """
    try:
        return compute()
    except Exception as error:
        if not model.compiled:
            raise
        # A failure that has nothing to do with compiled code will come again, and end the run.
        cause = getattr(error, "inner_exception", error)  # torch's own says only that the compiler failed
        cause = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
        warnings.warn(f"compiled layers fail, so updates run plain ones from here on: {cause}", stacklevel=2)
    model.compiled = False
    clear_gradients(model)
    return compute()


def choose_layers(model: ActorCritic, minibatch_s: Callable[[], float], *, left: int, estimate_s: float) -> str | None:
    """Decide whether the updates to come run compiled layers, and set ``model.compiled``.

    They do if the time that they save is longer than compiling has taken.

    Args:
        model: policy and critic.
        minibatch_s: run a minibatch, and return the seconds that it takes.
        left: minibatches to come.
        estimate_s: seconds of a minibatch in the update before.
    Returns:
        What was measured, in words; None: nothing, or compiling failed.
    """
    model.compiled = False
    if left * estimate_s < WORTH_A_TRY_S:
        return None
    plain_s = min(minibatch_s(), minibatch_s())
    model.compiled = True
    first_s = minibatch_s()
    compiled_s = min(minibatch_s(), minibatch_s())
    if not model.compiled:
        return None
    saved_s, cost_s = left * (plain_s - compiled_s), max(first_s - compiled_s, 0.0)
    model.compiled = saved_s > cost_s
    verdict = "updates run compiled layers" if model.compiled else "updates run plain layers"
    return (
        f"compile=auto: {verdict}: {compiled_s:.3g} s a minibatch compiled, {plain_s:.3g} s plain, {cost_s:.0f} s to "
        f"compile, {left} minibatches to come"
    )


def timed_minibatch(
    model: ActorCritic, compute: Callable[[], object], device: torch.device, processes: ProcessGroup
) -> float:
    """Compute a minibatch's gradients, and clear them.

    Returns:
        The seconds of the slowest process. If compiled layers have failed on one, none uses them afterwards.
    """
    _wait_for(device)
    started = time.perf_counter()
    compute()
    _wait_for(device)
    took = time.perf_counter() - started
    clear_gradients(model)
    facts = processes.facts(lambda: [took, model.compiled])
    model.compiled = all(compiled for _, compiled in facts)
    return max(seconds for seconds, _ in facts)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
