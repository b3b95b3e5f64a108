"""PPOTrainer: generate, score, estimate, update, report; the loop that fine-tunes a language model from a reward."""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ppo.backward import minibatch_gradient
from rlhf_ppo.blackbox import write_black_box
from rlhf_ppo.checkpoint import Boundary, load_checkpoint, save_checkpoint
from rlhf_ppo.collect import Collector
from rlhf_ppo.config import RLHFConfig
from rlhf_ppo.conversation import Respond, RespondError
from rlhf_ppo.core import (
    Experience,
    adapt_clip_range,
    adapt_kl_coef,
    adapt_penalty_beta,
    minibatch_indices,
)
from rlhf_ppo.data import Prompt, PromptSet
from rlhf_ppo.experience import describe, estimate
from rlhf_ppo.explanation import explain_rollout
from rlhf_ppo.fingerprints import run_fingerprints
from rlhf_ppo.gradients import clear_gradients, clip_and_step
from rlhf_ppo.guard import PolicyDriftError, StepWatch, nonfinite_parameters, require_no_drift, spoil_gradient
from rlhf_ppo.optimization import make_optimizer, only_the_critic_learns, warmup_settings
from rlhf_ppo.reward_calls import RewardError
from rlhf_ppo.rollout import Rollout
from rlhf_ppo.runtime.checkpoint import find_checkpoint
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.explain import Explanation
from rlhf_ppo.runtime.files import replacing_files
from rlhf_ppo.runtime.lock import run_lock
from rlhf_ppo.runtime.metrics import MetricAverage
from rlhf_ppo.runtime.plots import plot_curves
from rlhf_ppo.runtime.progress import ProgressDisplay
from rlhf_ppo.runtime.run_directory import RunDirectory
from rlhf_ppo.runtime.seeding import global_rng_state, restore_rng_state, torch_threads
from rlhf_ppo.runtime.signals import Interrupted, asked_to_stop, stop_if_asked, stop_on_signals
from rlhf_ppo.runtime.timing import Stopwatch
from rlhf_ppo.runtime.trackers import reporting
from rlhf_ppo.score_shaping import ScoreStatistics
from rlhf_ppo.setup import RewardSource, Rows, set_up

Callback = Callable[["PPOTrainer", dict[str, float]], object]
"""``callback(trainer, metrics)`` after each update; returning True ends the run after it."""

PANELS = {
    "score/mean": "score",
    "kl/reference_nats_per_response": "KL to the reference (nats per response)",
    "policy/entropy": "entropy (nats per token)",
    "value/explained_variance": "critic: explained variance",
}

MAX_ROLLBACKS = 3
"""Times that a run goes back to the same checkpoint."""

_TRAIN_STREAM, _SHUFFLE_STREAM, _EVAL_STREAM = range(3)


class RatioTripwireError(RuntimeError):
    """Old and new log-probs differ before any optimizer step: sampling and training disagree."""


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _name(model: str | PreTrainedModel) -> str:
    return model if isinstance(model, str) else model.config._name_or_path


class PPOTrainer:
    """Fine-tunes a causal language model with PPO: prompts are states, tokens are actions.

    ``train()`` runs everything; ``rollout(prompts)`` and ``step(rollout)`` are the same loop one step at a time.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardSource | Sequence[RewardSource],
        args: RLHFConfig,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | PreTrainedModel | None = None,
        value_model: str | PreTrainedModel | None = None,
        peft_config: Any = None,
        callbacks: Sequence[Callback] | None = None,
        respond: Respond | None = None,
    ) -> None:
        """Check everything that can be checked, cheapest first, then load the models.

        Args:
            model: hub id, folder or model: the policy's start, and the reference unless ``ref_model`` is given.
            reward_funcs: callable, ``file.py:function``, hub id, folder or sequence-classification model, or a list.
            args: settings.
            train_dataset: rows with a column ``prompt`` (text or chat messages); other columns reach the rewards.
            eval_dataset: held-out rows of the same form.
            processing_class: the policy's tokenizer, if it does not lie beside the model. It is never changed.
            ref_model: another reference than the policy's own start.
            value_model: trunk of a critic of its own; default: a value head on the policy's trunk.
            peft_config: train an adapter; the reference is then the same model with the adapter off.
            callbacks: called after each update.
            respond: answers the policy's turns where ``max_turns`` is above 1: ``respond(messages)`` returns text, or
                None to end the conversation (see :data:`rlhf_ppo.conversation.Respond`).
        Raises:
            ValueError: bad settings, data, reward or models; says which, and what to do.
        """
        parts = set_up(
            model,
            reward_funcs,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            ref_model=ref_model,
            value_model=value_model,
            peft_config=peft_config,
            respond=respond,
        )
        self.args = args
        self.device, self.tokenizer = parts.device, parts.tokenizer
        self.stop_token_ids = parts.stop_token_ids
        self.train_prompts, self.eval_prompts = parts.train_prompts, parts.eval_prompts
        self.model, self.reference = parts.model, parts.reference
        self.callbacks = list(callbacks or [])
        self.run = RunDirectory(args.output_dir)
        self.sources = {"model": _name(model), "ref_model": None if ref_model is None else _name(ref_model)}
        """Where policy and reference came from, for run.json."""
        self.parts = parts
        self.stopwatch = Stopwatch(self.device)
        self.timings: dict[str, float] = {}
        """Seconds that each phase of the last iteration took."""
        self.collector = Collector(parts, args, self.run, self.stopwatch)
        self.optimizer, self.scheduler = make_optimizer(self.model, args)
        # What controllers move during a run: the KL penalty's weight, and clip range or beta inside the objective.
        self.kl_coef = args.kl_coef
        self.objective = args
        self.score_statistics = ScoreStatistics()
        self.iteration = self.episodes = self.optimizer_steps = self.rollouts_made = 0
        self.skipped_in_a_row = 0
        self._problem: str | None = None  # what the last update found wrong
        self._rollbacks = 0  # to the last checkpoint
        self.best: dict[str, float] | None = None
        """The best evaluation during training so far: its iteration and eval/score_mean."""
        self._checkpoint: tuple[int, Path] | None = None  # the last one: its iteration and folder
        self._boundary: Boundary | None = None

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Which data, reference and adapter this run has; see :func:`rlhf_ppo.fingerprints.run_fingerprints`."""
        return run_fingerprints(self.parts)

    # The algorithm

    def train(
        self, resume_from_checkpoint: str | Path | None = None, *, resume_override: bool = False
    ) -> dict[str, float]:
        """Run to ``total_episodes`` and save the model into ``output_dir``.

        Args:
            resume_from_checkpoint: folder ``checkpoint-<n>`` of a run with the same arguments (see ``save_every``), or
                that run's folder for its newest good one: the run goes on, and never starts afresh. "auto": the newest
                good one in ``output_dir``, and a fresh start if there is none at all.
            resume_override: resume although settings or data have changed.
        Returns:
            The last metrics, with those of the last evaluation if there is an ``eval_dataset``.
        Raises:
            FileNotFoundError, ValueError: there is no such checkpoint, or it is damaged or another run's; or another
                run is writing into ``output_dir``.
            OSError: a checkpoint could not be written (a full disk); the earlier ones are untouched.
            Interrupted: SIGINT or SIGTERM came; a checkpoint is saved first, from which the run goes on exactly.
            RewardError: a reward function failed; likewise, and the responses are saved.
            NonFiniteGradientError, PolicyDriftError: likewise, if the settings say so (``on_nonfinite``, bounds).
            RatioTripwireError: the update cannot be trusted; the model is saved first.
        """
        args = self.args
        if self.train_prompts is None:
            raise ValueError("train() needs a train_dataset with a column 'prompt'")
        wanted = args.rollout_batch_size // args.num_generations
        if len(self.train_prompts) < wanted:
            warnings.warn(
                f"train_dataset has {len(self.train_prompts)} prompts, fewer than the {wanted} of a rollout "
                f"(rollout_batch_size={args.rollout_batch_size}): each rollout repeats some",
                stacklevel=2,
            )
        planned = args.num_rollouts * args.rollout_batch_size
        if planned != args.total_episodes and not args.quiet:
            whole = f"whole rollouts of {args.rollout_batch_size}"
            print(f"total_episodes={args.total_episodes} rounds up to {planned}: {whole}")
        if self.iteration >= args.num_rollouts:
            raise ValueError(
                f"all {args.num_rollouts} rollouts of this run are done: raise total_episodes in a new trainer"
            )
        settings = {**self.sources, **dataclasses.asdict(args)}
        trackers = reporting(self.run, args.report_to, project="rlhf-ppo", settings=settings)
        with run_lock(self.run.path), torch_threads(args.num_threads), stop_on_signals():
            self._begin(resume_from_checkpoint, settings, override=resume_override)
            # What a tracker still has to send is waited for after everything is saved.
            with trackers:
                try:
                    metrics = self._train(self.train_prompts, planned)
                except BaseException as error:
                    self._save_after(error)
                    raise
                self.save_model()
        plot_curves(
            self.run.read(),
            self.run.path / "curve.png",
            x="progress/episodes",
            panels=PANELS,
            title="PPO, scores and KL",
        )
        return metrics

    def _begin(self, resume: str | Path | None, settings: dict[str, Any], *, override: bool) -> None:
        """Start afresh, or go on from a checkpoint."""
        checkpoint = None if resume is None else find_checkpoint(resume, self.run.path)
        if checkpoint is None:
            self.run.start(settings)
            self._checkpoint = None
            return
        load_checkpoint(self, checkpoint, override=override)
        if not self.args.quiet:
            print(f"going on after iteration {self.iteration}, from {checkpoint.folder}")
        self._checkpoint = (self.iteration, checkpoint.folder)
        self.run.go_on(checkpoint.folder, self.iteration, settings)

    def _train(self, prompts: PromptSet, planned: int) -> dict[str, float]:
        args = self.args
        # A run that was killed after its last rollout still has its end to write.
        metrics: dict[str, float] = {}
        if self.iteration >= args.num_rollouts and (lines := self.run.read()):
            metrics = lines[-1]
        if args.on_nonfinite == "rollback":
            self._save_checkpoint()  # something to go back to
        with ProgressDisplay("episodes", planned, quiet=args.quiet) as progress:
            while self.iteration < args.num_rollouts:
                self._boundary = Boundary.of(self)
                if self._evaluation_is_due():
                    self._log_evaluation()
                self.stopwatch.take()  # evaluations are no part of an iteration
                batch = prompts.batch(self.iteration, args.rollout_batch_size // args.num_generations)
                rollout = self.rollout(batch.prompts, **batch.columns)
                metrics = self._step(rollout)
                self._boundary = Boundary.of(self)
                self.timings = self.stopwatch.take()
                self._report(progress, rollout, metrics)
                if not self._is_sound():
                    continue
                require_no_drift(metrics, args)
                # Before the save, so that what they change or draw is in it: a resumed run does not call them again.
                wants_stop = [callback(self, metrics) is True for callback in self.callbacks]
                self._boundary = Boundary.of(self)
                ends = any(wants_stop) or self.iteration == args.num_rollouts
                if args.save_every and (ends or self.iteration % args.save_every == 0):
                    self._save_checkpoint()
                if any(wants_stop):
                    break
                stop_if_asked()
        return {**metrics, **self._log_evaluation()}

    def _evaluation_is_due(self) -> bool:
        every = self.args.eval_every
        return self.iteration == 0 or (every > 0 and self.iteration % every == 0)

    def _is_sound(self) -> bool:
        """Whether the update just made can stand; False: the run is back at its last checkpoint.

        Raises:
            NonFiniteGradientError: it cannot, and there is no going back.
        """
        if (problem := self._problem) is None:
            return True
        self._problem, self.skipped_in_a_row = None, 0
        if self.args.on_nonfinite == "rollback" and self._checkpoint is not None and self._rollbacks < MAX_ROLLBACKS:
            made, self._rollbacks = self.rollouts_made, self._rollbacks + 1
            load_checkpoint(self, self._checkpoint[1], override=True)
            self.rollouts_made = made  # other draws: the same would lead to the same
            self.run.rewind(self.iteration)
            warnings.warn(f"{problem}. Going back to {self._checkpoint[1]}, with other draws", stacklevel=3)
            return False
        raise NonFiniteGradientError(problem)

    def _save_after(self, error: BaseException) -> None:
        """Whatever ends a run, what was learned until then stays; between two updates, so that the run can go on."""
        if asked_to_stop() and type(error) is KeyboardInterrupt:
            return  # a second signal, maybe in the middle of an update
        if nonfinite_parameters(self.model):
            return  # nothing worth saving, and nothing that should replace what there is
        folder: Path | None = None
        if isinstance(error, (Interrupted, RewardError, RespondError, NonFiniteGradientError, PolicyDriftError)):
            folder = self._save_checkpoint()
        self._save_model_if_possible()
        if isinstance(error, Interrupted):
            error.saved = folder
        elif folder is not None:
            raise type(error)(f"{error}. Go on with resume_from_checkpoint={folder}") from error.__cause__

    def _save_model_if_possible(self) -> None:
        """What ended the run may be in the way here, too (a full disk), and is the error to see."""
        try:
            self.save_model()
        except (OSError, SafetensorError) as error:
            warnings.warn(f"the model could not be saved into {self.run.path}: {error}", stacklevel=2)

    def _save_checkpoint(self) -> Path:
        """Save where the run is now, unless that has just been done. Not to be called in the middle of an update."""
        if self._checkpoint is None or self._checkpoint[0] != self.iteration:
            self._checkpoint = (self.iteration, save_checkpoint(self, self._boundary))
            self._rollbacks = 0
        return self._checkpoint[1]

    def rollout(self, prompts: Sequence[Prompt], **columns: list[Any]) -> Rollout:
        """Generate ``num_generations`` responses to each prompt, side by side, score them, and read the reference.

        Args:
            prompts: text or chat messages; B = their number times num_generations.
            columns: other columns for the reward functions, one value a prompt each.
        Raises:
            ValueError: a prompt is bad; names its number.
            RewardError: see :func:`rlhf_ppo.scoring.score_responses`; the responses are in failed_rollout.jsonl.
            RespondError: see :func:`rlhf_ppo.conversation.converse`; likewise.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"rollout() takes a list of one or more prompts, got {prompts!r}")
        if (copies := self.args.num_generations) > 1:
            prompts = [prompt for prompt in prompts for _ in range(copies)]
            columns = {name: [x for x in column for _ in range(copies)] for name, column in columns.items()}
        number = self.rollouts_made + 1
        rollout = self.collector.collect(prompts, columns, self._generator(_TRAIN_STREAM, number))
        # Counted once it is there: a run that a reward ended goes on with the very rollout that failed.
        self.rollouts_made = number
        return rollout

    def step(self, rollout: Rollout) -> dict[str, float]:
        """One PPO update on a rollout; returns its metrics.

        Raises:
            RatioTripwireError: old and new log-probs differ before the first optimizer step.
            NonFiniteGradientError: too many steps in a row were not finite (``on_nonfinite``, ``max_skipped_steps``),
                or the weights are not.
        """
        metrics = self._step(rollout)
        self._is_sound()
        return metrics

    def _step(self, rollout: Rollout) -> dict[str, float]:
        with self.stopwatch.phase("update"):
            if not self.warming_up:
                return self._update(rollout)
            with only_the_critic_learns(self.model):
                return self._update(rollout)

    def explain(self, rollout: Rollout) -> Explanation:
        """What the policy's tokens of a rollout earned and taught, one row a token; nothing is trained.

        Made after ``step(rollout)``, its ratios show what that update did. See ``.text()``, ``.to_dataframe()`` and
        ``.plot(path)``.
        """
        return explain_rollout(self, rollout)

    @property
    def warming_up(self) -> bool:
        """Whether the next update trains the critic alone (``critic_warmup_rollouts``)."""
        return self.iteration < self.args.critic_warmup_rollouts

    @property
    def objective_in_force(self) -> RLHFConfig:
        """The settings that the next update's loss is made of."""
        return warmup_settings(self.objective) if self.warming_up else self.objective

    def _update(self, rollout: Rollout) -> dict[str, float]:
        args = warmup_settings(self.args) if self.warming_up else self.args
        # What an update learns about scores counts only if the update does.
        statistics = copy.deepcopy(self.score_statistics) if args.normalize_scores else None
        if statistics is not None:
            statistics.add(rollout)
        old, metrics = estimate(rollout, args, kl_coef=self.kl_coef, score_statistics=statistics)
        not_finite = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        metrics["policy/clip_range"] = self.objective.clip_range
        metrics["policy/penalty_beta"] = self.objective.penalty_beta
        actions, losses = MetricAverage(), MetricAverage()
        shuffle = self._generator(_SHUFFLE_STREAM, self.iteration, device="cpu")
        watch = StepWatch(
            self.skipped_in_a_row,
            limit=1 if args.on_nonfinite == "stop" else args.max_skipped_steps,
            on_skip=lambda skipped: write_black_box(self, rollout, old, skipped, not_finite),
        )
        epochs, epoch, stop = 0, MetricAverage(), False
        while epochs < args.num_epochs and not stop:
            epochs += 1
            epoch = MetricAverage()
            for minibatch in minibatch_indices(len(rollout.prompts), args.num_minibatches, generator=shuffle):
                rows = minibatch.tolist()
                step, step_losses = self._accumulate_gradients(rollout, old, rows)
                watch.settle()
                if watch.steps == 0:
                    metrics["policy/first_minibatch_max_abs_log_ratio"] = self._check_tripwire(step)
                limit = args.stopping_kl
                if beyond := limit is not None and step.compute()["approx_kl"] > limit:
                    actions.merge(step)
                    epoch.merge(step)
                if stop := beyond or watch.gave_up:
                    clear_gradients(self.model)
                    break
                spoil_gradient(self.model.trainable_parameters(), step_losses, not_finite)
                grad_norm, finite = clip_and_step(self.optimizer, self.model.trainable_parameters(), args.max_grad_norm)
                self.scheduler.step()
                clear_gradients(self.model)
                actions.merge(step, only_if=finite)
                epoch.merge(step, only_if=finite)
                taken = {**step_losses, "grad_norm": grad_norm}
                losses.add({name: torch.where(finite, x, 0.0) for name, x in taken.items()}, weight=finite)
                watch.add(finite, rows, taken)
        watch.settle()
        steps, self.skipped_in_a_row = watch.steps, watch.in_a_row
        self._problem = self._find_problem(watch)
        accepted = steps == 0 or watch.skipped < steps
        if statistics is not None and accepted:
            self.score_statistics = statistics
        if accepted and not self.warming_up:
            self._adapt(
                metrics["kl/reference_nats_per_response"],
                epoch.compute().get("approx_kl", math.nan),
                len(rollout.prompts),
            )
        self.iteration += 1
        self.episodes += len(rollout.prompts)
        self.optimizer_steps += steps
        loss = losses.compute() if steps else {"policy": 0.0, "value": 0.0, "kl": 0.0, "grad_norm": 0.0}
        if args.kl_loss_coef > 0:
            metrics["kl/loss"] = loss["kl"]
        if args.value_learning_rate is not None:
            metrics["optim/value_learning_rate"] = float(self.scheduler.get_last_lr()[-1])
        return {
            "progress/iteration": self.iteration,
            "progress/episodes": self.episodes,
            "progress/optimizer_steps": self.optimizer_steps,
            **actions.compute("policy/"),
            **metrics,
            "policy/loss": loss["policy"],
            "value/loss": loss["value"],
            "optim/grad_norm": loss["grad_norm"],
            "optim/learning_rate": float(self.scheduler.get_last_lr()[0]),
            "optim/skipped_steps": watch.skipped,
            "optim/epochs": epochs,
        }

    def _accumulate_gradients(
        self, rollout: Rollout, old: Experience, minibatch: list[int]
    ) -> tuple[MetricAverage, dict[str, Tensor]]:
        """Backward over one minibatch in microbatches; the gradient is the same however it is split."""
        objective = self.objective_in_force
        exact_kl = objective.kl_loss_coef > 0 and objective.kl_loss == "exact"
        return minibatch_gradient(
            self.model,
            rollout,
            old,
            self.parts.batches(rollout, minibatch),
            objective,
            bf16=self.parts.bf16,
            reference=self.reference if exact_kl else None,
        )

    def _find_problem(self, watch: StepWatch) -> str | None:
        number = self.iteration + 1
        if broken := nonfinite_parameters(self.model):
            return (
                f"after the update on rollout {number} the weights {_few(broken)} are not finite: lower learning_rate, "
                "and go on from an earlier checkpoint"
            )
        if not watch.gave_up:
            return None
        return (
            f"{watch.in_a_row} optimizer steps in a row, the last in the update on rollout {number}, had losses or "
            f"gradients that were not finite and were skipped: see {self.run.path}/blackbox-* (rlhf-ppo replay FOLDER),"
            " look for extreme rewards or values in samples.jsonl and metrics.jsonl, or lower learning_rate"
        )

    def _check_tripwire(self, first_step: MetricAverage) -> float:
        gap = first_step.compute()["max_abs_log_ratio"]
        if math.isnan(gap):
            return gap  # the step's gradient will be NaN, too, and the guard sees to that
        bound = self.args.max_initial_log_ratio or (0.5 if self.parts.bf16 else 0.1)
        if not gap <= bound:
            clear_gradients(self.model)
            raise RatioTripwireError(
                f"before the first optimizer step some |log(new/old)| is {gap:.3g} nats, above max_initial_log_ratio="
                f"{bound}: sampling and training disagree. Usual causes: weights changed "
                "between rollout() and step(), dropout or another source of noise in the model, a model whose cached "
                "decoding differs from its full forward pass (try recompute_logprobs=True), weights that are no longer "
                "finite (lower learning_rate), or low precision (raise the bound)"
            )
        return gap

    def _adapt(self, reference_kl: float, update_kl: float, num_samples: int) -> None:
        """Controllers move once per update."""
        args = self.args
        if args.kl_target is not None:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, reference_kl, target=args.kl_target, horizon=args.kl_horizon, num_samples=num_samples
            )
        if (target := args.steering_kl) is None:
            return
        if args.objective == "penalty":
            beta = adapt_penalty_beta(self.objective.penalty_beta, update_kl, target=target)
            self.objective = dataclasses.replace(self.objective, penalty_beta=beta)
        else:
            clip_range = adapt_clip_range(self.objective.clip_range, update_kl, target=target)
            self.objective = dataclasses.replace(self.objective, clip_range=clip_range)

    def _generator(self, stream: int, number: int, device: torch.device | str | None = None) -> torch.Generator:
        """A generator that depends on seed, purpose and number alone, so that any rollout can be made again."""
        state = np.random.SeedSequence([self.args.seed, stream, number]).generate_state(1, np.uint64)[0]
        return torch.Generator(device or self.device).manual_seed(int(state >> np.uint64(1)))

    # Evaluation, report, saving

    def evaluate(self) -> dict[str, float]:
        """Sample a response to every evaluation prompt and measure it; the same draws at every call.

        Returns:
            ``eval/score_mean`` (raw scores), ``eval/score_std``, ``eval/kl_nats_per_response``,
            ``eval/reference_nats_per_token``, ``eval/length_tokens`` and ``eval/eos_fraction``.
        Raises:
            ValueError: there is no ``eval_dataset``.
        """
        return self._evaluate()[0]

    def _evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        if self.eval_prompts is None:
            raise ValueError("evaluate() needs an eval_dataset with a column 'prompt'")
        size = self.args.rollout_batch_size
        rows: list[dict[str, Any]] = []
        # What rewards draw here from global generators must not shift what they draw in training.
        generators = global_rng_state()
        for number, start in enumerate(range(0, len(self.eval_prompts), size)):
            batch = self.eval_prompts.take(range(start, min(start + size, len(self.eval_prompts))))
            generator = self._generator(_EVAL_STREAM, number)
            # A short last batch may happen to have no score; only a whole evaluation without one says nothing.
            rows += describe(self.collector.collect(batch.prompts, batch.columns, generator, needs_scores=False))
        restore_rng_state(generators)
        scores = [row["score"] for row in rows if row["score"] is not None]
        if not scores:
            raise RewardError("the reward scored none of the responses to the evaluation prompts (None for all)")
        return {
            "eval/score_mean": float(np.mean(scores)),
            "eval/score_std": float(np.std(scores)),
            "eval/kl_nats_per_response": float(np.mean([row["kl_nats"] for row in rows])),
            "eval/reference_nats_per_token": float(np.mean([row["reference_nats_per_token"] for row in rows])),
            "eval/length_tokens": float(np.mean([row["tokens"] for row in rows])),
            "eval/eos_fraction": float(np.mean([row["finished"] for row in rows])),
        }, rows

    def _log_evaluation(self) -> dict[str, float]:
        if self.eval_prompts is None:
            return {}
        metrics, rows = self._evaluate()
        score = metrics["eval/score_mean"]
        if self.iteration > 0 and (self.best is None or score > self.best["eval/score_mean"]):
            self.best = {"iteration": self.iteration, "eval/score_mean": score}
            if self.args.save_best:
                self._save_checkpoint()
        self.run.log({"progress/iteration": self.iteration, "progress/episodes": self.episodes, **metrics})
        for row in rows:
            self.run.append("eval_samples.jsonl", {"iteration": self.iteration, **row})
        return metrics

    def _report(self, progress: ProgressDisplay, rollout: Rollout, metrics: dict[str, float]) -> None:
        # Where no step was finite, some averages have nothing to average.
        self.run.log({name: value for name, value in metrics.items() if math.isfinite(value)})
        for row in describe(rollout)[: self.args.samples_per_rollout]:
            self.run.append("samples.jsonl", {"iteration": self.iteration, **row})
        tokens = int(rollout.lengths.sum())
        self.run.append("timings.jsonl", {"iteration": self.iteration, "generated_tokens": tokens, **self.timings})
        progress.update(
            self.episodes,
            score=metrics["score/mean"],
            kl=metrics["kl/reference_nats_per_response"],
            entropy=metrics["policy/entropy"],
            clipped=metrics["policy/clip_fraction"],
        )

    def save_model(self, output_dir: str | Path | None = None, *, merge_adapter: bool = False) -> Path:
        """Save policy and tokenizer as an ordinary transformers folder, the critic beside them.

        Args:
            output_dir: folder; default: the run's.
            merge_adapter: under PEFT, save the whole model with the adapter merged in, instead of the adapter alone.
        Raises:
            ValueError: merge_adapter without an adapter.
        """
        folder = Path(output_dir or self.args.output_dir)
        policy: Any = self.model.policy
        adapted = hasattr(policy, "merge_and_unload")
        if merge_adapter:
            if not adapted:
                raise ValueError("merge_adapter=True needs an adapter, but the run has no peft_config")
            policy, adapted = copy.deepcopy(policy).merge_and_unload(), False
        with replacing_files(folder) as new:
            policy.save_pretrained(new, **({"selected_adapters": [policy.active_adapter]} if adapted else {}))
            self.tokenizer.save_pretrained(new)
            self.model.save_critic(new)
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool = True, merge_adapter: bool = False) -> str:
        """Upload what :meth:`save_model` writes to the Hugging Face hub; returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder, merge_adapter=merge_adapter)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
