"""One PPO update on a rollout: epochs of minibatches, when to stop, and controllers that move after it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from classic.checkpoint import Progress
from classic.minibatch_record import UpdateRecord, largest_gap
from classic.networks.actor_critic import ActorCritic, Decisions
from classic.report import estimate_metrics
from classic.rollout import Estimate, Rollout, estimate_advantages
from rlhf_ppo.core import (
    Experience,
    PolicyOutput,
    PPOConfig,
    adapt_clip_range,
    adapt_penalty_beta,
    kl_estimate,
    masked_mean,
    masked_whiten,
    minibatch_indices,
    ppo_diagnostics,
)
from rlhf_ppo.runtime.errors import NonFiniteGradientError, RatioTripwireError

if TYPE_CHECKING:
    from classic.ppo import PPO

MAX_SKIPPED_IN_A_ROW = 10


def update(agent: PPO, rollout: Rollout, estimate: Estimate, progress: Progress) -> dict[str, float]:
    """Train on a rollout.

    Args:
        agent: its weights, optimizer, controllers and count of optimizer steps move.
        rollout: what was collected; only its real decisions are learned from, since autoreset steps are gone from its
            rows, or masked inside sequences.
        estimate: its values and advantages.
        progress: counts skipped steps from one update to the next.
    Returns:
        The update's metrics.
    Raises:
        NonFiniteGradientError: ten steps in a row had to be skipped.
        RatioTripwireError: old and new log-probs differ before the first optimizer step.
    """
    args, config = agent.args, agent.config
    decisions, old = rollout.decisions(), _experience(rollout, estimate, config)
    record = UpdateRecord()
    steps = skipped = epochs = 0
    stop = False
    while epochs < config.num_epochs and not stop:
        epochs += 1
        if args.recompute_advantages and epochs > 1:
            old = _experience(rollout, estimate_advantages(agent.network, rollout, config), config)
        for taken, part in shuffled_minibatches(decisions, old, config.num_minibatches, agent.generator):
            new = agent.gradients.evaluate(taken)
            record.saw(new, part)
            if steps == 0:
                _check_tripwire(agent, largest_gap(new, part))
            if stop := went_too_far(new, part, config):
                break
            agent.optimizer.zero_grad()
            loss = agent.gradients.backward(new, part, config)
            norm = agent.optimizer.clip_gradient(config.max_grad_norm)
            steps += 1
            # A loss may overflow while its gradient does not.
            if not math.isfinite(norm + loss):
                record.forget()
                skipped += 1
                progress.skipped_in_a_row += 1
                _stop_if_diverged(agent, progress.skipped_in_a_row)
                continue
            progress.skipped_in_a_row = 0
            agent.optimizer.step()
            record.stepped(norm)
    agent.counters["optimizer_steps"] += steps - skipped
    agent.config = adapted(config, agent.network, decisions, old)
    return {
        **record.metrics(config),
        **estimate_metrics(estimate, rollout.mask),
        "policy/clip_range": config.clip_range,
        "policy/penalty_beta": config.penalty_beta,
        "optim/learning_rate": agent.optimizer.lr,
        "optim/skipped_steps": skipped,
        "optim/epochs": epochs,
    }


def _experience(rollout: Rollout, estimate: Estimate, config: PPOConfig) -> Experience:
    """What was recorded and estimated, in rows for minibatches. Returns keep the scale that the critic learns."""
    values, _, advantages, returns = estimate
    weights = masked_whiten(advantages, rollout.mask) if config.normalize_advantages else advantages
    return Experience(*map(rollout.rows, (rollout.logprobs, values, weights, returns, rollout.mask)))


def shuffled_minibatches(
    decisions: Decisions, old: Experience, num_minibatches: int, generator: torch.Generator
) -> Iterator[tuple[Decisions, Experience]]:
    """One epoch: every row once, in a fresh order, as parts of (decisions, old).

    The rollout is gathered as a whole; the parts are slices of that, which cost nothing.
    """
    parts = minibatch_indices(len(decisions), num_minibatches, generator=generator)
    order, sizes = torch.cat(parts), [part.shape[0] for part in parts]
    yield from zip(_parts(decisions, order, sizes), _parts(old, order, sizes), strict=True)


def _parts(record: Any, order: Tensor, sizes: list[int]) -> Iterator[Any]:
    """The rows of a record of tensors (some None) in an order, as one record for each size."""
    fields = vars(record)
    columns = [repeat(None) if x is None else x.index_select(0, order).split(sizes) for x in fields.values()]
    for _, *row in zip(sizes, *columns, strict=False):
        yield type(record)(**dict(zip(fields, row, strict=True)))


def went_too_far(new: PolicyOutput, old: Experience, config: PPOConfig) -> bool:
    """Whether the update ends before its step on this minibatch (target_kl)."""
    if config.stopping_kl is None:
        return False
    kl = kl_estimate(old.logprobs, new.logprobs.detach(), "k3")
    return float(masked_mean(kl, old.mask)) > config.stopping_kl


@torch.no_grad()
def adapted(config: PPOConfig, network: ActorCritic, decisions: Decisions, old: Experience) -> PPOConfig:
    """Once per update: beta or the clip range moved by the KL that the update brought about."""
    if (target := config.steering_kl) is None:
        return config
    kl = float(ppo_diagnostics(network.evaluate(decisions), old, config)["approx_kl"])
    if config.objective == "penalty":
        return replace(config, penalty_beta=adapt_penalty_beta(config.penalty_beta, kl, target=target))
    return replace(config, clip_range=adapt_clip_range(config.clip_range, kl, target=target))


def _check_tripwire(agent: PPO, gap: float) -> None:
    bound = agent.args.max_initial_log_ratio or 0.1
    if gap > bound:  # not where it is NaN: that is a gradient to be skipped
        raise RatioTripwireError(
            f"environment {agent.env_id!r}, iteration {agent.counters['iteration'] + 1}: before the first optimizer "
            f"step some |log(new/old)| is {gap:.3g} nats, above max_initial_log_ratio={bound}: acting and training "
            "disagree. Usual causes: a layer that draws noise or follows statistics of its batch (dropout, batch "
            "normalisation; agent.network.eval() turns both off), weights or layers that changed between a rollout and "
            "its update, or a standard deviation so small that rounding shows (lower learning_rate, or raise the bound)"
        )


def _stop_if_diverged(agent: PPO, skipped: int) -> None:
    if skipped >= MAX_SKIPPED_IN_A_ROW:
        raise NonFiniteGradientError(
            f"environment {agent.env_id!r}, iteration {agent.counters['iteration'] + 1}: {skipped} gradients in a "
            "row, or their losses, were not finite and their steps skipped; lower learning_rate, or scale the "
            "rewards down"
        )
