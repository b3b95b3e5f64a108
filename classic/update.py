"""Update the policy on a rollout: epochs of minibatches, when to stop, and the controllers after it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from classic.advantages import estimate_advantages, to_experience
from classic.config import PPOArgs, filled
from classic.networks.decisions import Decisions, on_device
from classic.report import UpdateRecord, largest_gap
from classic.rollout import Rollout
from classic.schedules import factor
from classic.state import Run, TrainState
from rlhf_ppo.core import (
    Experience,
    PolicyOutput,
    PPOConfig,
    adapt_clip_range,
    adapt_penalty_beta,
    kl_estimate,
    masked_mean,
    minibatch_indices,
    ppo_diagnostics,
)
from rlhf_ppo.runtime.errors import NonFiniteGradientError, RatioTripwireError

MAX_CONSECUTIVE_SKIPS = 10
DEFAULT_MAX_INITIAL_LOG_RATIO = 0.1


def follow_schedules(state: TrainState, args: PPOArgs) -> None:
    """Set Adam's settings, the clip range and the entropy bonus for the share of steps that is done."""
    done = state.done / state.progress.total
    state.optimizer.lr = filled(args.learning_rate) * factor(filled(args.lr_schedule), done)
    state.optimizer.eps, state.optimizer.weight_decay = filled(args.adam_eps), filled(args.weight_decay)
    state.config = args.scheduled(state.config, done)


def update(state: TrainState, run: Run, rollout: Rollout, old: Experience) -> dict[str, float]:
    """Train on a rollout: ppo_loss, backward, clip, check and step for every minibatch of every epoch.

    Args:
        state: its weights, optimizer and counts of steps change.
        run: settings, and the environment's name for messages.
        rollout: what was collected; masked steps are not learned from.
        old: its experience, in minibatch rows; its values and returns are in the units of ``state.value_scale``.
    Returns:
        The update's metrics.
    Raises:
        NonFiniteGradientError: ten consecutive steps had to be skipped.
        RatioTripwireError: old and new log-probs differ before the first optimizer step.
    """
    args, config, progress, scale = run.args, state.config, state.progress, state.value_scale
    where = f"environment {run.env_id!r}, iteration {state.counters['iteration'] + 1}"
    device = state.device
    decisions, old = on_device(rollout.decisions(), device), on_device(old, device)
    record = UpdateRecord()
    steps = skipped = epochs = 0
    stop = False
    while epochs < config.num_epochs and not stop:
        epochs += 1
        if args.recompute_advantages and epochs > 1:
            estimate = estimate_advantages(state.network, rollout, config, scale)
            old = on_device(to_experience(rollout, estimate, config, scale), device)
        for taken, part in shuffled_minibatches(decisions, old, config.num_minibatches, state.generator):
            new = state.gradients.evaluate(taken)
            record.add(new, part)
            if steps == 0:
                _check_initial_ratio(largest_gap(new, part), args.max_initial_log_ratio, where)
            if stop := exceeds_target_kl(new, part, config):
                break
            loss = state.gradients.backward(new, part, config)
            norm = state.optimizer.clip_gradient(config.max_grad_norm)
            steps += 1
            # A loss may overflow while its gradient does not.
            if not math.isfinite(norm + loss):
                record.drop()
                skipped += 1
                progress.consecutive_skips += 1
                _check_consecutive_skips(progress.consecutive_skips, where)
                continue
            progress.consecutive_skips = 0
            state.optimizer.step()
            record.stepped(norm)
    state.counters["optimizer_steps"] += steps - skipped
    std = 1.0 if scale is None else scale.std
    return {
        **record.metrics(config, std),
        **(_unit_metrics(std, config) if args.normalize_values else {}),
        "policy/clip_range": config.clip_range,
        "policy/penalty_beta": config.penalty_beta,
        "optim/learning_rate": state.optimizer.lr,
        "optim/skipped_steps": skipped,
        "optim/epochs": epochs,
    }


def shuffled_minibatches(
    decisions: Decisions, old: Experience, num_minibatches: int, generator: torch.Generator
) -> Iterator[tuple[Decisions, Experience]]:
    """Yield one epoch: every row once, in a fresh order, as parts of (decisions, old).

    The whole rollout is gathered once; the parts are slices of it, which cost nothing.
    """
    parts = minibatch_indices(len(decisions), num_minibatches, generator=generator)
    order, sizes = torch.cat(parts).to(old.logprobs.device), [part.shape[0] for part in parts]
    yield from zip(_parts(decisions, order, sizes), _parts(old, order, sizes), strict=True)


def _parts(record: Any, order: Tensor, sizes: list[int]) -> Iterator[Any]:
    """Yield the rows of a record of tensors (some None) in an order, one record per size."""
    fields = vars(record)
    columns = [repeat(None) if x is None else x.index_select(0, order).split(sizes) for x in fields.values()]
    for _, *row in zip(sizes, *columns, strict=False):
        yield type(record)(**dict(zip(fields, row, strict=True)))


def exceeds_target_kl(new: PolicyOutput, old: Experience, config: PPOConfig) -> bool:
    """Whether the update stops before its step on this minibatch (target_kl)."""
    if config.stopping_kl is None:
        return False
    kl = kl_estimate(old.logprobs, new.logprobs.detach(), "k3")
    return float(masked_mean(kl, old.mask)) > config.stopping_kl


@torch.no_grad()
def adapt(state: TrainState, rollout: Rollout, old: Experience) -> None:
    """Adapt the penalty's beta or the clip range to the KL that the update caused over the whole rollout."""
    config = state.config
    if (target := config.steering_kl) is None:
        return
    new = state.network.evaluate(rollout.decisions())
    kl = float(ppo_diagnostics(new, on_device(old, state.device), config)["approx_kl"])
    if config.objective == "penalty":
        beta = adapt_penalty_beta(config.penalty_beta, kl, target=target)
        state.config = replace(config, penalty_beta=beta)
    else:
        state.config = replace(config, clip_range=adapt_clip_range(config.clip_range, kl, target=target))


def _unit_metrics(std: float, config: PPOConfig) -> dict[str, float]:
    """Return the critic's unit, and what depends on it, in the reward's units."""
    clip_range = {} if config.clip_range_vf is None else {"value/clip_range": config.clip_range_vf * std}
    return {"value/return_std": std, **clip_range}


def _check_initial_ratio(gap: float, bound: float | None, where: str) -> None:
    bound = bound or DEFAULT_MAX_INITIAL_LOG_RATIO
    if gap > bound:  # a NaN passes: that step is skipped
        raise RatioTripwireError(
            f"{where}: before the first optimizer step some |log(new/old)| is {gap:.3g} nats, above "
            f"max_initial_log_ratio={bound}: acting and training disagree. Usual causes: a layer that draws noise or "
            "uses batch statistics (dropout, batch normalisation; agent.network.eval() turns both off), weights or "
            "layers that changed between a rollout and its update, or a standard deviation so small that rounding "
            "shows (lower learning_rate, or raise the bound)"
        )


def _check_consecutive_skips(skips: int, where: str) -> None:
    if skips >= MAX_CONSECUTIVE_SKIPS:
        raise NonFiniteGradientError(
            f"{where}: {skips} consecutive gradients, or their losses, were non-finite and their steps skipped; lower "
            "learning_rate, or scale the rewards down"
        )
