"""Update: epochs of minibatches on one rollout, checked before the first step and after each; then controllers."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import adapt_clip_range, adapt_kl_coef, adapt_penalty_beta, minibatch_indices
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.runtime.errors import RatioTripwireError
from rlhf_ppo.runtime.logs.lines import LOGGER
from rlhf_ppo.runtime.logs.metrics import MetricAverage
from rlhf_ppo.runtime.seeding import SHUFFLE, numbered_generator
from rlhf_ppo.training.checkpoints.black_box import write_black_box
from rlhf_ppo.training.experience import Estimates
from rlhf_ppo.training.gradients import clear_gradients, clip_and_step
from rlhf_ppo.training.models.compilation import choose_layers, timed_minibatch
from rlhf_ppo.training.optimizer import train_critic_alone
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.stability import StepWatch, nonfinite_parameters, spoil_gradient
from rlhf_ppo.training.state import TrainState


class Update(NamedTuple):
    """Result of an update."""

    metrics: dict[str, float]
    num_responses: int
    last_epoch_kl: float
    """KL(old || new) in nats per action over the last epoch; NaN if no step of it was finite."""
    moves_controllers: bool
    """False if every step was non-finite, or the critic alone was trained."""
    problem: str | None
    """Why the update must be undone, or None."""


def update(state: TrainState, run: Run, rollout: Rollout, estimates: Estimates) -> Update:
    """Train on a rollout, and count it.

    Args:
        state: weights, optimizer, schedule, value scale, score statistics and counters change.
        run: seed, epochs, minibatches and limits are its settings; non-finite steps leave a black box in its folder.
        rollout: B scored responses.
        estimates: what to learn from them.
    Raises:
        RatioTripwireError: old and new log-probs differ before the first optimizer step.
    """
    args, warming_up = state.effective_settings(run.args), state.warms_up(run.args)
    watch = StepWatch(
        state.consecutive_skips,
        limit=1 if args.on_nonfinite == "stop" else args.max_skipped_steps,
        on_skip=lambda step: write_black_box(state, run, rollout, estimates, step),
    )
    before, started = copy.deepcopy((state.model.value_head, state.model.value_scale)), time.perf_counter()
    state.model.change_value_scale(estimates.value_scale)
    with train_critic_alone(state.model, on=warming_up):
        averages = _run_epochs(state, run, args, rollout, estimates, watch)
    state.consecutive_skips = watch.consecutive
    problem = _find_problem(state, run, watch)
    accepted = watch.steps == 0 or watch.skipped < watch.steps
    if accepted:
        state.score_statistics = estimates.rewards.score_statistics
    else:
        state.model.restore_head(*before)
    state.iteration += 1
    state.episodes += len(rollout.prompts)
    state.optimizer_steps += watch.steps
    if state.model.compiled is None and run.tries_compiling and accepted and not warming_up and watch.steps:
        _choose_layers(state, run, rollout, estimates, (time.perf_counter() - started) / watch.steps)
    metrics = _update_metrics(state, args, estimates.metrics, averages, watch)
    kl = averages.epoch.compute().get("approx_kl", math.nan)
    return Update(metrics, len(rollout.prompts), kl, accepted and not warming_up, problem)


def _choose_layers(state: TrainState, run: Run, rollout: Rollout, estimates: Estimates, estimate_s: float) -> None:
    """Decide by the rollout's first minibatch whether the updates to come run compiled layers; the run's only time."""
    model, args = state.model, state.effective_settings(run.args)
    rows = range(len(rollout.prompts) // args.num_minibatches)
    compute = partial(run.minibatch_gradient, model, rollout, estimates.experience, rows, args)
    minibatch_s = partial(timed_minibatch, model, compute, run.device, run.processes)
    left = run.args.num_optimizer_steps - state.optimizer_steps
    said = choose_layers(model, minibatch_s, left=left, estimate_s=max(run.processes.facts(lambda: estimate_s)))
    if said is not None and not run.args.quiet:
        LOGGER.info("%s", said)


class _Averages:
    """What is measured during an update, over the optimizer steps that were taken."""

    def __init__(self) -> None:
        self.actions, self.epoch, self.losses = MetricAverage(), MetricAverage(), MetricAverage()
        self.epochs = 0
        self.first_gap = math.nan
        """Largest |log ratio| before the first step."""

    def enter_epoch(self, number: int) -> None:
        if number != self.epochs:
            self.epochs, self.epoch = number, MetricAverage()

    def add(self, step: MetricAverage, only_if: Tensor | None = None) -> None:
        for average in (self.actions, self.epoch):
            average.merge(step, only_if=only_if)

    def add_losses(self, numbers: dict[str, Tensor], finite: Tensor) -> None:
        """Add a step's losses and gradient norm, if they are finite."""
        self.losses.add({name: torch.where(finite, x, 0.0) for name, x in numbers.items()}, weight=finite)


def _run_epochs(
    state: TrainState, run: Run, args: RLHFConfig, rollout: Rollout, estimates: Estimates, watch: StepWatch
) -> _Averages:
    """Take the optimizer steps: first the policy's epochs, which a limit on the KL may end, then the critic's own.

    Both end when ``watch`` gives up.
    """
    model, averages = state.model, _Averages()
    given = (model, rollout, estimates.experience)
    shuffle = numbered_generator(args.seed, SHUFFLE, state.iteration, "cpu")
    # 1. Policy and critic.
    for epoch, rows in _minibatches(len(rollout.prompts), args.num_epochs, args.num_minibatches, shuffle):
        averages.enter_epoch(epoch)
        step, losses = run.minibatch_gradient(*given, rows, args)
        watch.settle()
        if watch.steps == 0:
            averages.first_gap = _check_first_ratio(state, run, step)
        if args.stopping_kl is not None and step.compute()["approx_kl"] > args.stopping_kl:
            averages.add(step)
            break
        if watch.gave_up:
            break
        numbers, finite = _take_step(state, losses, estimates.nonfinite, args.max_grad_norm)
        averages.add(step, only_if=finite)
        averages.add_losses(numbers, finite)
        watch.add(finite, rows, numbers, critic_alone=False)
    clear_gradients(model)
    # 2. The critic alone.
    with train_critic_alone(model, on=args.critic_only_epochs > 0):
        for _, rows in _minibatches(
            len(rollout.prompts), args.critic_only_epochs, args.critic_only_minibatches, shuffle
        ):
            losses = run.critic_gradient(*given, rows, args)
            watch.settle()
            if watch.gave_up:
                break
            numbers, finite = _take_step(state, losses, estimates.nonfinite, args.max_grad_norm)
            averages.add_losses(numbers, finite)
            watch.add(finite, rows, numbers, critic_alone=True)
        clear_gradients(model)
    watch.settle()
    return averages


def _minibatches(rows: int, epochs: int, minibatches: int, shuffle: torch.Generator) -> Iterator[tuple[int, list[int]]]:
    """Yield (the epoch's number, from 1; the rows of a minibatch); each epoch has an order of its own."""
    for epoch in range(1, epochs + 1):
        for minibatch in minibatch_indices(rows, minibatches, generator=shuffle):
            yield epoch, minibatch.tolist()


def _take_step(
    state: TrainState, losses: dict[str, Tensor], nonfinite: dict[str, float], max_grad_norm: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Take one optimizer step with the gradients that are there, and clear them.

    Returns:
        (the losses and the gradient's norm [], whether the gradient was finite [] bool).
    """
    parameters = state.model.trainable_parameters()
    spoil_gradient(parameters, losses, nonfinite)
    grad_norm, finite = clip_and_step(state.optimizer, parameters, max_grad_norm)
    state.scheduler.step()
    clear_gradients(state.model)
    return {**losses, "grad_norm": grad_norm}, finite


def _update_metrics(
    state: TrainState, args: RLHFConfig, estimated: dict[str, float], averages: _Averages, watch: StepWatch
) -> dict[str, float]:
    losses = dict.fromkeys(("policy", "value", "kl", "positive", "grad_norm"), 0.0) | averages.losses.compute()
    rates, scale = state.scheduler.get_last_lr(), state.model.value_scale
    return {
        "progress/iteration": state.iteration,
        "progress/episodes": state.episodes,
        "progress/optimizer_steps": state.optimizer_steps,
        **averages.actions.compute("policy/"),
        **estimated,
        "policy/clip_range": args.clip_range,
        "policy/penalty_beta": args.penalty_beta,
        "policy/first_minibatch_max_abs_log_ratio": averages.first_gap,
        **({"kl/loss": losses["kl"]} if args.kl_loss_coef > 0 else {}),
        **({"policy/positive_loss": losses["positive"]} if args.positive_loss_coef > 0 else {}),
        **({} if args.value_learning_rate is None else {"optim/value_learning_rate": float(rates[-1])}),
        "policy/loss": losses["policy"],
        # In the reward's units, like all that is reported about values.
        "value/loss": losses["value"] * (1.0 if scale is None else scale.std**2),
        "optim/grad_norm": losses["grad_norm"],
        "optim/learning_rate": float(rates[0]),
        "optim/skipped_steps": watch.skipped,
        "optim/epochs": averages.epochs,
    }


def adapt(state: TrainState, args: RLHFConfig, update: Update) -> None:
    """Let controllers move the KL coefficient, and the clip range or beta, once per update."""
    if not update.moves_controllers:
        return
    if args.kl_target is not None:
        state.kl_coef = adapt_kl_coef(
            state.kl_coef,
            update.metrics["kl/reference_nats_per_response"],
            target=args.kl_target,
            horizon=args.kl_horizon,
            num_samples=update.num_responses,
        )
    if (target := args.steering_kl) is None:
        return
    if args.objective == "penalty":
        state.penalty_beta = adapt_penalty_beta(state.penalty_beta, update.last_epoch_kl, target=target)
    else:
        state.clip_range = adapt_clip_range(state.clip_range, update.last_epoch_kl, target=target)


def _check_first_ratio(state: TrainState, run: Run, first_step: MetricAverage) -> float:
    """Return the largest |log ratio| before the first optimizer step, which must be near 0 on a policy's own tokens."""
    gap = first_step.compute()["max_abs_log_ratio"]
    if math.isnan(gap):
        return gap  # the gradient is NaN, too, and its own check skips the step
    if run.recording is not None and state.iteration > 0:
        return gap  # another policy sampled these responses
    bound = run.initial_ratio_bound
    if not gap <= bound:
        clear_gradients(state.model)
        raise RatioTripwireError(
            f"before the first optimizer step some |log(new/old)| is {gap:.3g} nats, above max_initial_log_ratio="
            f"{bound}: sampling and training disagree. Usual causes: weights changed "
            "between rollout() and step(), dropout or another source of noise in the model, a model whose cached "
            "decoding differs from its full forward pass (try recompute_logprobs=True), non-finite weights (lower "
            "learning_rate), or low precision (raise the bound)"
        )
    return gap


def _find_problem(state: TrainState, run: Run, watch: StepWatch) -> str | None:
    number = state.iteration + 1
    if broken := nonfinite_parameters(state.model):
        names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        return (
            f"after the update on rollout {number} the weights {names} are non-finite: lower learning_rate, and resume "
            "from an earlier checkpoint"
        )
    if not watch.gave_up:
        return None
    return (
        f"{watch.consecutive} consecutive optimizer steps, the last in the update on rollout {number}, had non-finite "
        f"losses or gradients and were skipped: see {run.folder.path}/blackbox-* (rlhf-ppo replay FOLDER), look for "
        "extreme rewards or values in samples.jsonl and metrics.jsonl, or lower learning_rate"
    )
