"""PPOTrainer: generate, score, estimate, update, report; the loop that fine-tunes a language model from a reward."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ppo.config.name_hints import ARGUMENTS
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import Experience
from rlhf_ppo.data.chat import Prompt
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.data.rows import RowSource
from rlhf_ppo.generation.multi_turn import Respond
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.compare import source_name
from rlhf_ppo.models.loading import BASE_FOLDER, REFERENCE_FOLDER
from rlhf_ppo.models.quiet_libraries import without_library_bars
from rlhf_ppo.models.saving import bytes_to_save, save_actor_critic, save_reference
from rlhf_ppo.rewards.functions import reward_source
from rlhf_ppo.runtime.errors import RatioTripwireError as RatioTripwireError
from rlhf_ppo.runtime.explain import Explanation
from rlhf_ppo.runtime.files import require_space
from rlhf_ppo.runtime.metrics import MetricAverage
from rlhf_ppo.runtime.package import versions
from rlhf_ppo.runtime.plots import plot_curves
from rlhf_ppo.runtime.processes import torch_threads
from rlhf_ppo.runtime.progress import ProgressDisplay, Stopwatch, print_summary
from rlhf_ppo.runtime.run_directory import RunDirectory, run_lock
from rlhf_ppo.runtime.seeding import TRAIN, numbered_generator
from rlhf_ppo.runtime.signals import stop_if_asked, stop_on_signals
from rlhf_ppo.runtime.trackers import reporting
from rlhf_ppo.runtime.unknown_names import refuse_unknown_arguments
from rlhf_ppo.runtime.user_code import callback_name, require_callbacks
from rlhf_ppo.training.checkpoint import Boundary
from rlhf_ppo.training.collect import Collector
from rlhf_ppo.training.explain import explain_rollout
from rlhf_ppo.training.fingerprints import run_fingerprints
from rlhf_ppo.training.gradients import minibatch_gradient
from rlhf_ppo.training.optimizer import make_optimizer, only_the_critic_learns, warmup_settings
from rlhf_ppo.training.reporting import PANELS, evaluate, log_evaluation, log_update, run_rows
from rlhf_ppo.training.resume import SafePoint, begin, go_back, keep_checkpoint, save_after, save_model
from rlhf_ppo.training.rewards import ScoreStatistics
from rlhf_ppo.training.setup import RewardSource, set_up
from rlhf_ppo.training.stability import require_no_drift
from rlhf_ppo.training.update import update

Callback = Callable[["PPOTrainer", dict[str, float]], object]
"""``callback(trainer, metrics)`` after each update; returning True ends the run after it."""


class PPOTrainer:
    """Fine-tunes a causal language model with PPO: prompts are states, tokens are actions.

    ``train()`` runs everything; ``rollout(prompts)`` and ``step(rollout)`` are the same loop one step at a time.
    """

    def __new__(cls, *args: Any, **arguments: Any) -> Self:
        """Say what an argument is called here, where Python would only say that it is unknown."""
        refuse_unknown_arguments(cls.__init__, "PPOTrainer", arguments, ARGUMENTS)
        return super().__new__(cls)

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardSource | Sequence[RewardSource],
        args: RLHFConfig,
        train_dataset: RowSource | None = None,
        eval_dataset: RowSource | None = None,
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
            peft_config: train an adapter; the reference is then the same model with the adapter off, or a copy where
                that is not what training starts from.
            callbacks: called after each update.
            respond: answers the policy's turns where ``max_turns`` is above 1: ``respond(messages)`` returns text, or
                None to end the conversation (see :data:`rlhf_ppo.generation.multi_turn.Respond`).
        Raises:
            ValueError: bad settings, data, reward or models; says which, and what to do.
        """
        self.callbacks: list[Callback] = require_callbacks(callbacks, "trainer, metrics")
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
        self.run = RunDirectory(args.output_dir, quiet=args.quiet)
        self.sources = {
            "model": source_name(model),
            "ref_model": None if ref_model is None else source_name(ref_model),
            "reference": parts.start or (BASE_FOLDER if parts.reference.model is None else REFERENCE_FOLDER),
        }
        """For run.json: where policy and reference came from (or "object"), and what holds the reference: a
        folder of the run itself if nothing else does."""
        listed = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        self.reward_sources = [reward_source(source) for source in listed]
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
        self.best: dict[str, float] | None = None
        """The best evaluation during training so far: its iteration and eval/score_mean."""
        self.safe = SafePoint()

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Which data, reference and adapter this run has; see ``run_fingerprints``."""
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
            OSError: a checkpoint or the model could not be written (a full disk); the earlier ones are untouched, and
                the message says where the model lies.
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
        if self.iteration >= args.num_rollouts:
            raise ValueError(
                f"all {args.num_rollouts} rollouts of this run are done: raise total_episodes in a new trainer"
            )
        settings = {**self.sources, **dataclasses.asdict(args)}
        trackers = reporting(self.run, args.report_to, project="rlhf-ppo", settings=settings)
        with (
            run_lock(self.run.path),
            torch_threads(args.num_threads, self.model),
            stop_on_signals(),
            without_library_bars(),
        ):
            # What the run will save at its end must not find a full disk there.
            needed = bytes_to_save(self.model, base=self.parts.base)
            require_space(self.run.path, needed, f"the model that is saved into {self.run.path}")
            facts = {
                "reward": self.reward_sources,
                **settings,
                "versions": versions("torch", "transformers", "peft"),
                "fingerprints": self.fingerprints,
            }
            begin(self, resume_from_checkpoint, facts, override=resume_override)
            print_summary(run_rows(self), quiet=args.quiet)
            if self.parts.start is None and self.reference.model is not None:
                save_reference(self.reference.model, self.tokenizer, self.run.path)
            # What a tracker still has to send is waited for after everything is saved.
            with trackers:
                try:
                    metrics = self._train(self.train_prompts, planned)
                except BaseException as error:
                    save_after(self, error)
                    raise
                save_model(self)
        plot_curves(
            self.run.read(),
            self.run.path / "curve.png",
            x="progress/episodes",
            panels=PANELS,
            title="PPO, scores and KL",
        )
        return metrics

    def _train(self, prompts: PromptSet, planned: int) -> dict[str, float]:
        args = self.args
        # A run that was killed after its last rollout still has its end to write.
        metrics: dict[str, float] = {}
        wants_stop: list[Callback] = []
        if self.iteration >= args.num_rollouts and (lines := self.run.read()):
            metrics = lines[-1]
        if args.on_nonfinite == "rollback":
            keep_checkpoint(self)  # something to go back to
        with (
            ProgressDisplay("episodes", planned, quiet=args.quiet) as progress,
            self.stopwatch.shown_by(progress.phase),
        ):
            progress.start(self.episodes)
            while self.iteration < args.num_rollouts:
                self.safe.boundary = Boundary.of(self)
                if self.iteration == 0 or (args.eval_every and self.iteration % args.eval_every == 0):
                    with progress.aside("evaluating"):
                        log_evaluation(self)
                self.stopwatch.take()  # evaluations are no part of an iteration
                batch = prompts.batch(self.iteration, args.rollout_batch_size // args.num_generations)
                rollout = self.rollout(batch.prompts, **batch.columns)
                metrics, problem = self._update(rollout)
                self.safe.boundary = Boundary.of(self)
                self.timings = self.stopwatch.take()
                log_update(self, rollout, metrics, progress)
                if problem is not None:
                    go_back(self, problem)
                    continue
                require_no_drift(metrics, args)
                # Before the save, so that what they change or draw is in it: a resumed run does not call them again.
                wants_stop = [callback for callback in self.callbacks if callback(self, metrics) is True]
                self.safe.boundary = Boundary.of(self)
                ends = bool(wants_stop) or self.iteration == args.num_rollouts
                if args.save_every and (ends or self.iteration % args.save_every == 0):
                    keep_checkpoint(self)
                if wants_stop:
                    break
                stop_if_asked()
            with progress.aside("evaluating"):
                last = {**metrics, **log_evaluation(self)}
        if wants_stop and not args.quiet:
            print(f"callback {callback_name(wants_stop[0])} ended the run after {self.episodes} of {planned} episodes")
        return last

    def rollout(self, prompts: Sequence[Prompt], **columns: list[Any]) -> Rollout:
        """Generate ``num_generations`` responses to each prompt, side by side, score them, and read the reference.

        Args:
            prompts: text or chat messages; B = their number times num_generations.
            columns: other columns for the reward functions, one value a prompt each.
        Raises:
            ValueError: a prompt is bad (names its number), or a column has another length.
            RewardError: see ``score_responses``; the responses are in failed_rollout.jsonl.
            RespondError: see :func:`rlhf_ppo.generation.multi_turn.sample_conversations`; likewise.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"rollout() takes a list of one or more prompts, got {prompts!r}")
        for name, column in columns.items():
            if len(column) != len(prompts):
                raise ValueError(
                    f"column {name!r} has {len(column)} values for {len(prompts)} prompts: one each is needed"
                )
        if (copies := self.args.num_generations) > 1:
            prompts = [prompt for prompt in prompts for _ in range(copies)]
            columns = {name: [x for x in column for _ in range(copies)] for name, column in columns.items()}
        number = self.rollouts_made + 1
        generator = numbered_generator(self.args.seed, TRAIN, number, self.device)
        rollout = self.collector.collect(prompts, columns, generator)
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
        metrics, problem = self._update(rollout)
        if problem is not None:
            go_back(self, problem)
        return metrics

    def _update(self, rollout: Rollout) -> tuple[dict[str, float], str | None]:
        with self.stopwatch.phase("update"):
            if not self.warming_up:
                return update(self, rollout, self._accumulate_gradients)
            with only_the_critic_learns(self.model):
                return update(self, rollout, self._accumulate_gradients)

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

    # Evaluation and saving

    def evaluate(self) -> dict[str, float]:
        """Sample a response to every evaluation prompt and measure it; the same draws at every call.

        Returns:
            ``eval/score_mean`` (raw scores), ``eval/score_std``, ``eval/kl_nats_per_response``,
            ``eval/reference_nats_per_token``, ``eval/length_tokens`` and ``eval/eos_fraction``.
        Raises:
            ValueError: there is no ``eval_dataset``.
        """
        return evaluate(self)[0]

    def save_model(self, output_dir: str | Path | None = None, *, merge_adapter: bool = False) -> Path:
        """Save policy and tokenizer as an ordinary transformers folder, the critic beside them, and load it again.

        What is loaded must be the policy in memory; that takes another copy of it in main memory while it lasts (see
        :func:`rlhf_ppo.models.compare.require_saved`). An adapter is saved alone, unless no folder or hub id holds its
        base as it is here (a model object that was changed, an adapter merged into it, PiSSA and its like): then
        ``base/`` does.

        Args:
            output_dir: folder; default: the run's.
            merge_adapter: under PEFT, save the whole model with the adapter merged in, instead of the adapter alone.
        Raises:
            ValueError: merge_adapter without an adapter.
            OSError: the disk is full, or the folder cannot be written; what lies there stays as it was.
            SavedModelError: what was saved is another model than the one in memory.
        """
        folder = Path(output_dir or self.args.output_dir)
        if merge_adapter and not hasattr(self.model.policy, "peft_config"):
            raise ValueError("merge_adapter=True needs an adapter, but the run has no peft_config")
        save_actor_critic(self.model, self.tokenizer, folder, base=self.parts.base, merged=merge_adapter)
        return folder

    def push_to_hub(self, repo_id: str | None = None, *, private: bool = True, merge_adapter: bool = False) -> str:
        """Upload what :meth:`save_model` writes to the Hugging Face hub; returns the commit's address.

        Args:
            repo_id: "user/name" or a name among yours; None: the name of ``output_dir``.
            private: of a repository that is new.
            merge_adapter: see :meth:`save_model`.
        Raises:
            ValueError: an adapter whose base lies nowhere but beside it, which nobody could load from the hub.
        """
        from huggingface_hub import HfApi

        if hasattr(self.model.policy, "peft_config") and self.parts.base is None and not merge_adapter:
            raise ValueError(
                "the model under this adapter is on no hub and in no folder of its own (a changed object, PiSSA and "
                "its like), so that the adapter alone could not be loaded from the hub: push_to_hub(merge_adapter=True)"
            )
        api = HfApi()
        repo_id = api.create_repo(repo_id or self.run.path.resolve().name, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder, merge_adapter=merge_adapter)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
