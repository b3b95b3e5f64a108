"""PPOTrainer: the loop that fine-tunes a language model with a reward: generate, score, estimate, update, report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ppo.config.name_hints import ARGUMENTS
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.rows import RowSource
from rlhf_ppo.generation.environments.episodes import TextEnvironment
from rlhf_ppo.generation.multi_turn import Respond
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.generation.tools.schemas import Tool
from rlhf_ppo.runtime.command_line.unknown_names import refuse_unknown_arguments
from rlhf_ppo.runtime.command_line.user_code import callback_name
from rlhf_ppo.runtime.errors import RatioTripwireError as RatioTripwireError
from rlhf_ppo.runtime.logs.lines import LOGGER
from rlhf_ppo.runtime.logs.progress import ProgressDisplay, print_summary
from rlhf_ppo.runtime.logs.trackers import reporting
from rlhf_ppo.runtime.machine.signals import stop_if_asked
from rlhf_ppo.training.checkpoints.resume import (
    SafePoint,
    begin,
    keep_checkpoint,
    roll_back,
    save_model,
    saving_after_errors,
)
from rlhf_ppo.training.experience import Estimates, estimate
from rlhf_ppo.training.outside.ahead import RolloutsAhead
from rlhf_ppo.training.outside.connect import require_agreement
from rlhf_ppo.training.recorded.recording import keep_rollout
from rlhf_ppo.training.recorded.replayed_rollouts import replay_rollout, require_first_policy
from rlhf_ppo.training.reports.reporting import (
    is_due,
    log_evaluation,
    log_traffic,
    log_update,
    plot_run,
    report_run,
    require_rollouts_left,
    resumed_metrics,
    run_facts,
    run_rows,
    run_settings,
    shown_progress,
)
from rlhf_ppo.training.reports.watching import begin_watch, observe, require_health
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.rollouts.collect import (
    closing_episodes,
    read_reference,
    score,
)
from rlhf_ppo.training.rollouts.resample import replace_without_signal
from rlhf_ppo.training.setup import RewardSource, set_up
from rlhf_ppo.training.state import TrainState
from rlhf_ppo.training.trainer.callbacks import Callback, read_callbacks, tell
from rlhf_ppo.training.trainer.methods import TrainerMethods
from rlhf_ppo.training.update import adapt, update

CallbackFunction = Callable[["PPOTrainer", dict[str, float]], object]
"""``callback(trainer, metrics)`` after each update; returning True ends the run after it."""


class PPOTrainer(TrainerMethods):
    """Fine-tune a causal language model with PPO: prompts are states, tokens are actions.

    ``train()`` runs everything; ``rollout(prompts)`` and ``step(rollout)`` are the same loop one step at a time, and
    not called by it.
    """

    def __new__(cls, *args: Any, **arguments: Any) -> Self:
        """Refuse unknown arguments, and say what those of other trainers are called here."""
        refuse_unknown_arguments(cls.__init__, "PPOTrainer", arguments, ARGUMENTS)
        return super().__new__(cls)

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardSource | Sequence[RewardSource] | None = None,
        args: RLHFConfig | None = None,
        train_dataset: RowSource | None = None,
        eval_dataset: RowSource | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | PreTrainedModel | None = None,
        value_model: str | PreTrainedModel | None = None,
        peft_config: Any = None,
        callbacks: Sequence[Callback | CallbackFunction] | None = None,
        respond: Respond | None = None,
        tools: Sequence[Tool] = (),
        environment: Callable[[], TextEnvironment] | None = None,
        judge_funcs: RewardSource | Sequence[RewardSource] = (),
    ) -> None:
        """Check everything that can be wrong, cheapest first, then load the models.

        Args:
            model: hub id, folder or model: the policy's start, and the reference unless ``ref_model`` is given.
            reward_funcs: callable, ``file.py:function``, hub id, folder or sequence-classification model, or a list.
                None: the environment's rewards alone.
            args: settings.
            train_dataset: rows with a column ``prompt`` (text or chat messages); other columns reach the rewards, and
                all of them the environment's ``reset``, which may say the prompt instead.
            eval_dataset: held-out rows of the same form.
            processing_class: the policy's tokenizer, if it is not in the model's folder. It is never changed.
            ref_model: another reference than the policy's own start.
            value_model: trunk of a critic of its own; default: a value head on the policy's trunk.
            peft_config: train an adapter; the reference is then the same model with the adapter off, or a copy where
                that is not what training starts from.
            callbacks: functions called after each update, or objects whose methods are called at more moments (see
                :class:`rlhf_ppo.Callback`).
            respond: answers the policy's turns if ``max_turns`` is above 1: ``respond(messages)`` returns text,
                messages, or None to end the conversation (see :data:`rlhf_ppo.generation.multi_turn.Respond`).
            tools: functions that the policy may call if ``max_turns`` is above 1; it sees their names, type hints and
                docstrings, and what they return answers its turns.
            environment: the class of what answers and rewards the policy's turns instead, or a function that makes
                one for each conversation (see :class:`rlhf_ppo.TextEnvironment`).
            judge_funcs: like ``reward_funcs``; they score some responses of each rollout and are never trained on.
        Raises:
            ValueError: bad settings, data, reward or models; says which, and what to do.
        """
        self.callbacks: list[CallbackFunction] = read_callbacks(callbacks)
        self.fixed, actor_critic = set_up(
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
            tools=tools,
            environment=environment,
            judge_funcs=judge_funcs,
        )
        require_first_policy(self.fixed, actor_critic)
        require_agreement(self.fixed, actor_critic)
        self.state = TrainState.start(actor_critic, self.fixed.args)
        self.safe = SafePoint()
        self.timings: dict[str, float] = {}  # seconds of each phase of the last iteration

    # The algorithm

    def train(
        self, resume_from_checkpoint: str | Path | None = None, *, resume_override: bool = False
    ) -> dict[str, float]:
        """Run to ``total_episodes``, save the model into ``output_dir``, and write curve.png and report.html there.

        Args:
            resume_from_checkpoint: folder ``checkpoint-<n>`` of a run with the same arguments (see ``save_every``), or
                a run's folder for its newest good one; never a fresh start. "auto": the newest good one in
                ``output_dir``, and a fresh start if there is none at all.
            resume_override: resume although settings or data have changed.
        Returns:
            The last metrics, with those of the last evaluation if there is an ``eval_dataset``.
        Raises:
            FileNotFoundError, ValueError: the checkpoint does not exist, is damaged, or is another run's; or another
                run is writing into ``output_dir``.
            OSError: a full disk; earlier checkpoints are untouched, and the message says where the model is.
            Interrupted: SIGINT or SIGTERM came; a checkpoint is saved first, from which the run resumes exactly.
            RewardError: a reward function failed; likewise, and the responses are saved.
            NonFiniteGradientError, PolicyDriftError, UnhealthyRunError: likewise, if the settings say so
                (``on_nonfinite``, bounds, ``watch``).
            RatioTripwireError: the update cannot be trusted; the model is saved first.
        """
        run, state, safe = self.fixed, self.state, self.safe
        require_rollouts_left(state, run)
        if type(self).rollout is not PPOTrainer.rollout or "rollout" in vars(self):
            warnings.warn("train() does not call rollout(): replacing it changes nothing here", stacklevel=2)
        trackers = reporting(run.folder, run.args.report_to, project="rlhf-ppo", settings=run_settings(run))
        with self._running():
            begin(state, run, safe, resume_from_checkpoint, run_facts(run), override=resume_override)
            since = state.iteration
            print_summary(run_rows(state, run), quiet=run.args.quiet)
            # Saved before the run waits for trackers.
            with trackers:
                with saving_after_errors(state, run, safe), shown_progress(state, run) as progress:
                    tell(self, self.callbacks, "on_train_begin")
                    metrics, ended_by = self._train(progress)
                if ended_by is not None and not self.args.quiet:
                    done = f"{state.episodes} of {run.planned_episodes} episodes"
                    LOGGER.info("callback %s ended the run after %s", callback_name(ended_by), done)
                save_model(state, run, safe)
                tell(self, self.callbacks, "on_save", run.folder.path)
                tell(self, self.callbacks, "on_train_end", metrics)
        plot_run(run)
        report_run(run)
        log_traffic(state, run, since=since)
        return metrics

    def _train(self, progress: ProgressDisplay) -> tuple[dict[str, float], CallbackFunction | None]:
        """Run PPO to the last rollout, or until a callback ends it; returns the last metrics and that callback."""
        run, state, safe, ended_by = self.fixed, self.state, self.safe, None
        metrics, ahead = resumed_metrics(state, run), RolloutsAhead()
        watch = begin_watch(run)
        if run.args.on_nonfinite == "rollback":
            tell(self, self.callbacks, "on_save", keep_checkpoint(state, run, safe))  # something to roll back to
        while state.iteration < run.args.num_rollouts and ended_by is None:
            run = self.fixed  # which callbacks may have changed
            safe.mark(state, run)
            if state.iteration == 0 or is_due(run.args.eval_every, state.iteration):
                self._evaluate(progress)
            run.stopwatch.take()  # evaluations are not part of an iteration

            args = state.effective_settings(run.args)
            if run.recording is None:
                with closing_episodes(run):
                    # 1. Sample responses to the next prompts, recording log-probs and values.
                    rollout = ahead.next(state, run)
                    # 2. Read the reference's log-probs.
                    rollout = read_reference(run, state.model, rollout)
                    # 3. Ask the reward functions.
                    rollout = score(run, rollout)
                    rollout, measured = replace_without_signal(run, state, rollout)  # under resample
                state.rollouts_made += 1  # only now: a run that a failed reward ended resumes with the same rollout
                ahead.start(state, run)  # under rollouts_ahead, the next one is sampled meanwhile
            else:
                # 1. to 3. were recorded; read what the critic says now.
                rollout, measured = replay_rollout(state, run, run.recording)
            tell(self, self.callbacks, "on_rollout_end", rollout)
            safe.between_updates = False
            with run.stopwatch.phase("update"):
                # 4. Shape the scores and charge the KL.
                rewards = shape_rewards(rollout, args, state.kl_coef, state.score_statistics)
                # 5. Estimate advantages and returns.
                estimates = estimate(rollout, rewards, args)
                # 6. Train on epochs of minibatches.
                updated = update(state, run, rollout, estimates)
                # 7. Let controllers move the coefficients.
                adapt(state, args, updated)
            # 8. Log, call back, save.
            safe.mark(state, run)
            metrics = {**updated.metrics, **measured}
            self._log(rollout, estimates, metrics, args, progress)
            keep_rollout(run, state.iteration, rollout)
            if updated.problem is not None:
                roll_back(state, run, safe, updated.problem)
                watch = begin_watch(run, watch)
                continue
            require_health(run, watch, metrics, args)
            ending = self._call_back(metrics)
            ended_by = ending[0] if ending else None
            safe.mark(state, run)  # what callbacks drew is in the checkpoint: a resumed run does not call them again
            if is_due(args.save_every, state.iteration, last=bool(ending) or state.iteration == args.num_rollouts):
                tell(self, self.callbacks, "on_save", keep_checkpoint(state, run, safe))
            if ended_by is None:
                run.processes.facts(stop_if_asked)
        return {**metrics, **self._evaluate(progress)}, ended_by

    def _log(
        self,
        rollout: Rollout,
        estimates: Estimates,
        metrics: dict[str, float],
        args: RLHFConfig,
        progress: ProgressDisplay,
    ) -> None:
        """Add what judges say to an update's metrics, and log them.

        They are logged if that fails, too: the update will be in a checkpoint, and a resumed run does not repeat it.
        """
        run, state = self.fixed, self.state
        try:
            metrics |= observe(state, run, rollout, estimates, args)
        finally:
            phases = run.stopwatch.take()
            self.timings = phases.seconds
            log_update(state, run, rollout, metrics, phases, progress)

    def _evaluate(self, progress: ProgressDisplay) -> dict[str, float]:
        """Evaluate, log and tell the callbacks, if there is an ``eval_dataset``."""
        before = self.safe.checkpoint
        metrics = log_evaluation(self.state, self.fixed, self.safe, progress)
        if metrics:
            tell(self, self.callbacks, "on_evaluate", metrics)
        if self.safe.checkpoint is not None and self.safe.checkpoint != before:
            tell(self, self.callbacks, "on_save", self.safe.checkpoint[1])
        return metrics

    def _call_back(self, metrics: dict[str, float]) -> list[CallbackFunction]:
        """Call the callbacks, on every process; returns those that end the run on some process."""
        ending = [number for number, callback in enumerate(self.callbacks) if callback(self, metrics) is True]
        votes = self.fixed.processes.facts(lambda: ending)
        return [self.callbacks[number] for number in sorted({number for some in votes for number in some})]


def load_checkpoint(trainer: PPOTrainer, folder: str | Path, *, override: bool = False) -> None:
    """Call :meth:`PPOTrainer.load_checkpoint`, which this function became."""
    trainer.load_checkpoint(folder, override=override)
