"""One PPO update on a rollout: advantages, epochs of minibatches, a tripwire, and controllers that move after it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_ppo.core import Experience, adapt_clip_range, adapt_kl_coef, adapt_penalty_beta, minibatch_indices
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.runtime.errors import RatioTripwireError
from rlhf_ppo.runtime.metrics import MetricAverage
from rlhf_ppo.runtime.seeding import SHUFFLE, numbered_generator
from rlhf_ppo.training.black_box import write_black_box
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.gradients import clear_gradients, clip_and_step
from rlhf_ppo.training.optimizer import warmup_settings
from rlhf_ppo.training.stability import StepWatch, nonfinite_parameters, spoil_gradient

if TYPE_CHECKING:
    from rlhf_ppo.trainer import PPOTrainer

MinibatchGradient = Callable[[Rollout, Experience, list[int]], tuple[MetricAverage, dict[str, Tensor]]]
"""Adds the gradient of a minibatch, named by its rows, to ``.grad``; see
:func:`rlhf_ppo.training.gradients.minibatch_gradient`."""


def update(trainer: PPOTrainer, rollout: Rollout, accumulate: MinibatchGradient) -> tuple[dict[str, float], str | None]:
    """Train on a rollout, and count it.

    Args:
        trainer: its weights, optimizer, controllers and counters move.
        rollout: B scored responses.
        accumulate: makes a minibatch's gradient.
    Returns:
        (the update's metrics, what is wrong with it or None).
    Raises:
        RatioTripwireError: old and new log-probs differ before the first optimizer step.
    """
    warming_up = trainer.warming_up
    args = warmup_settings(trainer.args) if warming_up else trainer.args
    model = trainer.model
    # What an update learns about scores counts only if the update does.
    statistics = copy.deepcopy(trainer.score_statistics) if args.normalize_scores else None
    if statistics is not None:
        statistics.add(rollout)
    old, metrics = estimate(rollout, args, kl_coef=trainer.kl_coef, score_statistics=statistics)
    not_finite = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    metrics["policy/clip_range"] = trainer.objective.clip_range
    metrics["policy/penalty_beta"] = trainer.objective.penalty_beta
    actions, losses = MetricAverage(), MetricAverage()
    shuffle = numbered_generator(args.seed, SHUFFLE, trainer.iteration, "cpu")
    watch = StepWatch(
        trainer.skipped_in_a_row,
        limit=1 if args.on_nonfinite == "stop" else args.max_skipped_steps,
        on_skip=lambda skipped: write_black_box(trainer, rollout, old, skipped, not_finite),
    )
    epochs, epoch, stop = 0, MetricAverage(), False
    while epochs < args.num_epochs and not stop:
        epochs += 1
        epoch = MetricAverage()
        for minibatch in minibatch_indices(len(rollout.prompts), args.num_minibatches, generator=shuffle):
            rows = minibatch.tolist()
            step, step_losses = accumulate(rollout, old, rows)
            watch.settle()
            if watch.steps == 0:
                metrics["policy/first_minibatch_max_abs_log_ratio"] = _check_tripwire(trainer, step)
            limit = args.stopping_kl
            if beyond := limit is not None and step.compute()["approx_kl"] > limit:
                actions.merge(step)
                epoch.merge(step)
            if stop := beyond or watch.gave_up:
                clear_gradients(model)
                break
            spoil_gradient(model.trainable_parameters(), step_losses, not_finite)
            grad_norm, finite = clip_and_step(trainer.optimizer, model.trainable_parameters(), args.max_grad_norm)
            trainer.scheduler.step()
            clear_gradients(model)
            actions.merge(step, only_if=finite)
            epoch.merge(step, only_if=finite)
            taken = {**step_losses, "grad_norm": grad_norm}
            losses.add({name: torch.where(finite, x, 0.0) for name, x in taken.items()}, weight=finite)
            watch.add(finite, rows, taken)
    watch.settle()
    steps, trainer.skipped_in_a_row = watch.steps, watch.in_a_row
    problem = _find_problem(trainer, watch)
    accepted = steps == 0 or watch.skipped < steps
    if statistics is not None and accepted:
        trainer.score_statistics = statistics
    if accepted and not warming_up:
        adapt(
            trainer,
            reference_kl=metrics["kl/reference_nats_per_response"],
            update_kl=epoch.compute().get("approx_kl", math.nan),
            num_samples=len(rollout.prompts),
        )
    trainer.iteration += 1
    trainer.episodes += len(rollout.prompts)
    trainer.optimizer_steps += steps
    loss = losses.compute() if steps else {"policy": 0.0, "value": 0.0, "kl": 0.0, "grad_norm": 0.0}
    if args.kl_loss_coef > 0:
        metrics["kl/loss"] = loss["kl"]
    if args.value_learning_rate is not None:
        metrics["optim/value_learning_rate"] = float(trainer.scheduler.get_last_lr()[-1])
    return {
        "progress/iteration": trainer.iteration,
        "progress/episodes": trainer.episodes,
        "progress/optimizer_steps": trainer.optimizer_steps,
        **actions.compute("policy/"),
        **metrics,
        "policy/loss": loss["policy"],
        "value/loss": loss["value"],
        "optim/grad_norm": loss["grad_norm"],
        "optim/learning_rate": float(trainer.scheduler.get_last_lr()[0]),
        "optim/skipped_steps": watch.skipped,
        "optim/epochs": epochs,
    }, problem


def adapt(trainer: PPOTrainer, *, reference_kl: float, update_kl: float, num_samples: int) -> None:
    """Controllers move once per update.

    Args:
        trainer: its KL coefficient, clip range or beta may move.
        reference_kl: KL to the reference in nats per response.
        update_kl: KL(old || new) in nats per action, over the last epoch.
        num_samples: responses of the rollout.
    """
    args, objective = trainer.args, trainer.objective
    if args.kl_target is not None:
        trainer.kl_coef = adapt_kl_coef(
            trainer.kl_coef, reference_kl, target=args.kl_target, horizon=args.kl_horizon, num_samples=num_samples
        )
    if (target := args.steering_kl) is None:
        return
    if args.objective == "penalty":
        beta = adapt_penalty_beta(objective.penalty_beta, update_kl, target=target)
        trainer.objective = dataclasses.replace(objective, penalty_beta=beta)
    else:
        clip_range = adapt_clip_range(objective.clip_range, update_kl, target=target)
        trainer.objective = dataclasses.replace(objective, clip_range=clip_range)


def _check_tripwire(trainer: PPOTrainer, first_step: MetricAverage) -> float:
    gap = first_step.compute()["max_abs_log_ratio"]
    if math.isnan(gap):
        return gap  # the step's gradient will be NaN, too, and the guard sees to that
    bound = trainer.args.max_initial_log_ratio or (0.5 if trainer.parts.bf16 else 0.1)
    if not gap <= bound:
        clear_gradients(trainer.model)
        raise RatioTripwireError(
            f"before the first optimizer step some |log(new/old)| is {gap:.3g} nats, above max_initial_log_ratio="
            f"{bound}: sampling and training disagree. Usual causes: weights changed "
            "between rollout() and step(), dropout or another source of noise in the model, a model whose cached "
            "decoding differs from its full forward pass (try recompute_logprobs=True), weights that are no longer "
            "finite (lower learning_rate), or low precision (raise the bound)"
        )
    return gap


def _find_problem(trainer: PPOTrainer, watch: StepWatch) -> str | None:
    number = trainer.iteration + 1
    if broken := nonfinite_parameters(trainer.model):
        return (
            f"after the update on rollout {number} the weights {_few(broken)} are not finite: lower learning_rate, "
            "and go on from an earlier checkpoint"
        )
    if not watch.gave_up:
        return None
    return (
        f"{watch.in_a_row} optimizer steps in a row, the last in the update on rollout {number}, had losses or "
        f"gradients that were not finite and were skipped: see {trainer.run.path}/blackbox-* (rlhf-ppo replay FOLDER),"
        " look for extreme rewards or values in samples.jsonl and metrics.jsonl, or lower learning_rate"
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
