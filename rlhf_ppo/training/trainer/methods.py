"""What a trainer does beside its loop: roll out and step by hand, record, evaluate, explain, save and publish."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_ppo.data.chat import Prompt
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.quiet_libraries import without_library_bars
from rlhf_ppo.models.saving import save_actor_critic
from rlhf_ppo.models.sharded.skeleton import whole_copy
from rlhf_ppo.runtime.explain import Explanation
from rlhf_ppo.runtime.logs.progress import print_summary
from rlhf_ppo.runtime.logs.run_directory import run_lock
from rlhf_ppo.runtime.machine.signals import stop_on_signals
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.training.checkpoints import checkpoint
from rlhf_ppo.training.checkpoints.resume import SafePoint, roll_back
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.outside.given import GivenResponses, given_rollout
from rlhf_ppo.training.outside.publish import withdraw
from rlhf_ppo.training.recorded.recorded_rollouts import Recording
from rlhf_ppo.training.recorded.recording import record_policy
from rlhf_ppo.training.reports.explain import explain_rollout
from rlhf_ppo.training.reports.reporting import (
    evaluate,
    require_rollouts_left,
    run_facts,
    run_rows,
    shown_progress,
)
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.rollouts.collect import collect, make_batch, next_draws
from rlhf_ppo.training.trainer.attributes import TrainerAttributes
from rlhf_ppo.training.update import adapt, update


class TrainerMethods(TrainerAttributes):
    """What :class:`rlhf_ppo.PPOTrainer` does beside its loop."""

    safe: SafePoint
    """Where the run can stop or go back to."""

    # The loop by hand

    def rollout(self, prompts: Sequence[Prompt], **columns: list[Any]) -> Rollout:
        """Generate ``num_generations`` responses to each prompt, side by side, score them, and read the reference.

        Args:
            prompts: text or chat messages; B = their number times num_generations.
            columns: other columns for the reward functions, one value per prompt each.
        Raises:
            ValueError: a prompt is bad (names its number), or a column has another length.
            RewardError, RespondError: a reward function, ``respond`` or an environment failed; failed_rollout.jsonl has
                the responses.
        """
        batch = make_batch(prompts, columns, copies=self.args.num_generations)
        rollout = collect(self.fixed, self.model, batch, next_draws(self.fixed, self.state))
        self.state.rollouts_made += 1
        return rollout

    def rollout_from(
        self,
        prompts: Sequence[Prompt],
        completion_ids: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float | None]],
        *,
        masks: Sequence[Sequence[bool]] | None = None,
        scores: Sequence[float | None] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **columns: list[Any],
    ) -> Rollout:
        """Make a rollout of responses that were sampled elsewhere: by an agent's own loop, or from a log.

        ``step`` learns from it: old log-probs are computed here, and importance weights (``importance_weights``) make
        up for the difference to the sampler's.

        Args:
            prompts: [B] text or chat messages, one for each response; groups of num_generations side by side.
            completion_ids: [B] the token ids after each prompt, of tools and environments, too.
            logprobs: [B] the sampler's log-prob of each id, at the run's temperature.
            masks: [B] False on ids that the policy did not choose, whose log-probs do not count; None: it chose all.
            scores: [B] one per response, or None for a response without one; None: ask the reward functions.
            prompt_ids: [B] the ids that the sampler read, if it did not use the run's tokenizer and chat template.
            columns: other columns for the reward functions, [B] each.
        Raises:
            ValueError: lengths differ, an id is not in the vocabulary, a response does not fit into the context, or a
                log-prob is none; names the response.
            RewardError: a reward function failed.
        """
        given = GivenResponses(prompts, prompt_ids, completion_ids, logprobs, masks, scores)
        return given_rollout(self.fixed, self.model, given, columns)

    def step(self, rollout: Rollout) -> dict[str, float]:
        """Run one PPO update on a rollout; returns its metrics.

        Raises:
            RatioTripwireError: old and new log-probs differ before the first optimizer step.
            NonFiniteGradientError: ``max_skipped_steps`` consecutive steps were non-finite, or the weights are.
        """
        run, state = self.fixed, self.state
        args = state.effective_settings(run.args)
        with run.stopwatch.phase("update"):
            rewards = shape_rewards(rollout, args, state.kl_coef, state.score_statistics)
            updated = update(state, run, rollout, estimate(rollout, rewards, args))
            adapt(state, args, updated)
        if updated.problem is not None:
            roll_back(state, run, self.safe, updated.problem)
        return updated.metrics

    def explain(self, rollout: Rollout) -> Explanation:
        """Show what each of the policy's tokens in a rollout earned and taught; nothing is trained.

        Made after ``step(rollout)``, its ratios show what that update did. See ``.text()``, ``.to_dataframe()`` and
        ``.plot(path)``.
        """
        return explain_rollout(self.state, self.fixed, rollout)

    # Recording, evaluation and saving

    def record(self) -> Recording:
        """Sample and score ``total_episodes`` responses, and record them in ``output_dir/rollouts``; train nothing.

        They are those that :meth:`train` would sample if no update changed the policy. ``save_rollouts_gb`` may end the
        recording earlier, with a warning. See docs/critic-laboratory.md.

        Returns:
            The recording: iterating it reads one :class:`Rollout` after the other.
        Raises:
            ValueError: there is no ``train_dataset``, or another run is writing into ``output_dir``.
            RewardError, RespondError: a reward function, ``respond`` or an environment failed; the rollouts before it
                are recorded.
            OSError: the disk is full; likewise.
            Interrupted: SIGINT or SIGTERM came; likewise.
        """
        run, state = self.fixed, self.state
        require_rollouts_left(state, run)
        with self._running():
            run.folder.start(run_facts(run))
            rows = {**run_rows(state, run), "run": f"{run.planned_episodes} responses to record"}
            untrained = {name: row for name, row in rows.items() if name not in ("trained", "learning rate")}
            print_summary(untrained, quiet=run.args.quiet)
            with shown_progress(state, run) as progress:
                return record_policy(state, run, progress)

    def evaluate(self) -> dict[str, float]:
        """Sample a response to every evaluation prompt, with the same draws at every call, and measure.

        Returns:
            ``eval/``: ``score_mean`` (raw scores), ``score_std``, ``kl_nats_per_response``,
            ``reference_nats_per_token``, ``length_tokens`` and ``eos_fraction``.
        Raises:
            ValueError: there is no ``eval_dataset``.
        """
        return evaluate(self.state, self.fixed)[0]

    def save_model(self, output_dir: str | Path | None = None, *, merge_adapter: bool = False) -> Path:
        """Save policy, tokenizer and critic as an ordinary transformers folder, then load it and compare.

        Comparing takes a second copy of the policy in main memory. An adapter is saved alone, unless no folder or hub
        id holds its base as it is here (a changed model object, PiSSA and its like): then ``base/`` does.

        Args:
            output_dir: folder; default: the run's.
            merge_adapter: under PEFT, save the whole model with the adapter merged in, instead of the adapter alone.
        Raises:
            ValueError: merge_adapter without an adapter.
            OSError: the disk is full, or the folder cannot be written; its files stay as they were.
            SavedModelError: what was saved is another model than the one in memory.
        """
        folder = Path(output_dir or self.args.output_dir)
        if merge_adapter and not hasattr(self.model.policy, "peft_config"):
            raise ValueError("merge_adapter=True needs an adapter, but the run has no peft_config")
        base = self.fixed.base
        with whole_copy(self.model, keep=self.fixed.processes.first) as model:
            model.value_scale = self.model.value_scale
            self.fixed.processes.on_first(
                lambda: save_actor_critic(model, self.tokenizer, folder, base=base, merged=merge_adapter)
            )
        return folder

    def push_to_hub(self, repo_id: str | None = None, *, private: bool = True, merge_adapter: bool = False) -> str:
        """Upload what :meth:`save_model` writes to the Hugging Face hub; returns the commit's address.

        Args:
            repo_id: "user/name" or a name among yours; None: the name of ``output_dir``.
            private: of a repository that is new.
            merge_adapter: see :meth:`save_model`.
        Raises:
            ValueError: an adapter whose base is saved beside it, which nobody could load from the hub.
        """
        from huggingface_hub import HfApi

        if hasattr(self.model.policy, "peft_config") and self.fixed.base is None and not merge_adapter:
            raise ValueError(
                "the model under this adapter is on no hub and in no folder of its own (a changed object, PiSSA and "
                "its like), so that the adapter alone could not be loaded from the hub: push_to_hub(merge_adapter=True)"
            )
        api, processes, wanted = HfApi(), self.fixed.processes, repo_id or self.run.path.resolve().name
        made = processes.on_first(lambda: api.create_repo(wanted, private=private, exist_ok=True).repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder, merge_adapter=merge_adapter)
            return processes.on_first(lambda: str(api.upload_folder(repo_id=made, folder_path=folder)))

    def load_checkpoint(self, folder: str | Path, *, override: bool = False) -> None:
        """Load ``checkpoint-<n>`` of a run with the same arguments, to export it by :meth:`save_model`."""
        checkpoint.load_checkpoint(self.state, self.fixed, folder, override=override)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Hold what a run needs: its folder's lock, its threads, handlers of signals, and a server's adapter."""
        run, state = self.fixed, self.state
        with (
            run_lock(run.folder.path, run.processes),
            torch_threads(run.args.num_threads, state.model),
            stop_on_signals(),
            without_library_bars(),
        ):
            try:
                yield
            finally:
                withdraw(run)
