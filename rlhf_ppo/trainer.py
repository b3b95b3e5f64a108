"""PPOTrainer: generate, score, estimate, update, report; the loop that fine-tunes a language model from a reward."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from rlhf_ppo.checkpoint import load_checkpoint, save_checkpoint
from rlhf_ppo.config import RLHFConfig
from rlhf_ppo.core import (
    Experience,
    adapt_clip_range,
    adapt_kl_coef,
    adapt_penalty_beta,
    compute_gae,
    explained_variance,
    kl_estimate,
    kl_penalized_rewards,
    loss_denominator,
    masked_mean,
    masked_var,
    masked_whiten,
    minibatch_indices,
    ppo_diagnostics,
    ppo_loss,
)
from rlhf_ppo.data import Prompt, fit_prompt, left_pad, tokenize_prompt
from rlhf_ppo.rewards import RewardError, score
from rlhf_ppo.rollout import Rollout, sample_responses
from rlhf_ppo.runtime.metrics import MetricAverage
from rlhf_ppo.runtime.plots import plot_curves
from rlhf_ppo.runtime.progress import ProgressDisplay
from rlhf_ppo.runtime.run_directory import RunDirectory
from rlhf_ppo.setup import RewardSource, Rows, set_up

Callback = Callable[["PPOTrainer", dict[str, float]], object]
"""``callback(trainer, metrics)`` after each update; returning True ends the run after it."""

PANELS = {
    "score/mean": "score",
    "kl/reference_nats_per_response": "KL to the reference (nats per response)",
    "policy/entropy": "entropy (nats per token)",
    "value/explained_variance": "critic: explained variance",
}

_TRAIN_STREAM, _SHUFFLE_STREAM, _EVAL_STREAM = range(3)


class RatioTripwireError(RuntimeError):
    """Old and new log-probs differ before any optimizer step: sampling and training disagree."""


class NonFiniteGradientError(RuntimeError):
    """Not one optimizer step on a rollout had a finite gradient."""


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
        )
        self.args = args
        self.device, self.tokenizer = parts.device, parts.tokenizer
        self.room, self.stop_token_ids = parts.room, parts.stop_token_ids
        self.train_prompts, self.eval_prompts = parts.train_prompts, parts.eval_prompts
        self.rewards, self.model, self.reference = parts.rewards, parts.model, parts.reference
        self.callbacks = list(callbacks or [])
        self.run = RunDirectory(args.output_dir)
        self.optimizer = torch.optim.AdamW(
            self.model.trainable_parameters(),
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=args.num_optimizer_steps,
        )
        # What controllers move during a run: the KL penalty's weight, and clip range or beta inside the objective.
        self.kl_coef = args.kl_coef
        self.objective = args
        self.iteration = self.episodes = self.optimizer_steps = self.rollouts_made = 0

    # The algorithm

    def train(self, resume_from_checkpoint: str | Path | None = None) -> dict[str, float]:
        """Run to ``total_episodes`` and save the model into ``output_dir``.

        Args:
            resume_from_checkpoint: folder ``checkpoint-<n>`` of a run with the same arguments (see ``save_every``).
        Returns:
            The last metrics, with those of the last evaluation if there is an ``eval_dataset``.
        Raises:
            FileNotFoundError, ValueError: there is no such checkpoint, or it is another model's.
            RewardError: a reward function failed; model and responses are saved first.
            RatioTripwireError, NonFiniteGradientError: the update cannot be trusted; the model is saved first.
        """
        args = self.args
        if self.train_prompts is None:
            raise ValueError("train() needs a train_dataset with a column 'prompt'")
        if len(self.train_prompts) < args.rollout_batch_size:
            warnings.warn(
                f"train_dataset has {len(self.train_prompts)} prompts, fewer than rollout_batch_size="
                f"{args.rollout_batch_size}: each rollout repeats some",
                stacklevel=2,
            )
        planned = args.num_rollouts * args.rollout_batch_size
        if planned != args.total_episodes and not args.quiet:
            whole = f"whole rollouts of {args.rollout_batch_size}"
            print(f"total_episodes={args.total_episodes} rounds up to {planned}: {whole}")
        if resume_from_checkpoint is None:
            self.run.start(dataclasses.asdict(args))
        else:
            load_checkpoint(self, resume_from_checkpoint)
            self.run.rewind(self.iteration)
        metrics: dict[str, float] = {}
        try:
            if resume_from_checkpoint is None:
                self._log_evaluation()
            with ProgressDisplay("episodes", planned, quiet=args.quiet) as progress:
                while self.iteration < args.num_rollouts:
                    batch = self.train_prompts.batch(self.iteration, args.rollout_batch_size)
                    rollout = self.rollout(batch.prompts, **batch.columns)
                    metrics = self.step(rollout)
                    self._report(progress, rollout, metrics)
                    if args.save_every and self.iteration % args.save_every == 0:
                        save_checkpoint(self)
                    wants_stop = [callback(self, metrics) is True for callback in self.callbacks]
                    if any(wants_stop):
                        break
                    if args.eval_every and self.iteration % args.eval_every == 0 and self.iteration < args.num_rollouts:
                        self._log_evaluation()
            evaluation = self._log_evaluation()
        finally:
            # Whatever ended the run, what was learned until then stays.
            self.save_model()
        plot_curves(
            self.run.read(),
            self.run.path / "curve.png",
            x="progress/episodes",
            panels=PANELS,
            title="PPO, scores and KL",
        )
        return {**metrics, **evaluation}

    def rollout(self, prompts: Sequence[Prompt], **columns: list[Any]) -> Rollout:
        """Generate one response to each prompt, score it, and read the reference.

        Args:
            prompts: [B] text or chat messages.
            columns: other columns for the reward functions, [B] each.
        Raises:
            ValueError: a prompt is bad; names its number.
            RewardError: see :func:`rlhf_ppo.rewards.score`; the responses are written to failed_rollout.jsonl first.
        """
        self.rollouts_made += 1
        return self._rollout(prompts, columns, self._generator(_TRAIN_STREAM, self.rollouts_made))

    def step(self, rollout: Rollout) -> dict[str, float]:
        """One PPO update on a rollout; returns its metrics.

        Raises:
            RatioTripwireError: old and new log-probs differ before the first optimizer step.
            NonFiniteGradientError: not one step had a finite gradient.
        """
        args = self.args
        old, metrics = self._estimate(rollout)
        actions, losses = MetricAverage(), MetricAverage()
        shuffle = self._generator(_SHUFFLE_STREAM, self.iteration, device="cpu")
        steps = skipped = epochs = 0
        epoch, stop = MetricAverage(), False
        while epochs < args.num_epochs and not stop:
            epochs += 1
            epoch = MetricAverage()
            for minibatch in minibatch_indices(len(rollout.prompts), args.num_minibatches, generator=shuffle):
                step, step_losses = self._accumulate_gradients(rollout, old, minibatch.to(self.device))
                if steps == 0:
                    metrics["policy/first_minibatch_max_abs_log_ratio"] = self._check_tripwire(step)
                actions.merge(step)
                epoch.merge(step)
                limit = args.stopping_kl
                if stop := limit is not None and step.compute()["approx_kl"] > limit:
                    self.optimizer.zero_grad(set_to_none=True)
                    break
                grad_norm = torch.nn.utils.clip_grad_norm_(self.model.trainable_parameters(), args.max_grad_norm)
                if torch.isfinite(grad_norm):
                    self.optimizer.step()
                    losses.add({**step_losses, "grad_norm": grad_norm}, weight=1)
                else:
                    skipped += 1
                self.optimizer.zero_grad(set_to_none=True)
                self.scheduler.step()
                steps += 1
        if skipped == steps:
            raise NonFiniteGradientError(
                f"all {steps} optimizer steps of rollout {self.iteration + 1} had non-finite gradients and were "
                "skipped; look for extreme rewards or values in samples.jsonl and metrics.jsonl, or lower learning_rate"
            )
        self._adapt(metrics["kl/reference_nats_per_response"], epoch.compute()["approx_kl"], len(rollout.prompts))
        self.iteration += 1
        self.episodes += len(rollout.prompts)
        self.optimizer_steps += steps
        loss = losses.compute()
        return {
            "progress/iteration": self.iteration,
            "progress/episodes": self.episodes,
            "progress/optimizer_steps": self.optimizer_steps,
            **metrics,
            **actions.compute("policy/"),
            "policy/loss": loss["policy"],
            "value/loss": loss["value"],
            "optim/grad_norm": loss["grad_norm"],
            "optim/learning_rate": float(self.scheduler.get_last_lr()[0]),
            "optim/skipped_steps": skipped,
            "optim/epochs": epochs,
        }

    def _estimate(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Rewards, advantages and returns of a rollout as the update's fixed facts, and what to log about them."""
        args = self.args
        if rollout.scores is None or rollout.scored is None or rollout.ref_logprobs is None:
            raise ValueError("this rollout has no scores or reference log-probs; make it with trainer.rollout(prompts)")
        # A response that could not be scored is left out as though it had not been sampled.
        mask = rollout.mask & rollout.scored[:, None]
        scores = rollout.scores - (args.missing_eos_penalty or 0.0) * (~rollout.finished).float()
        kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator)
        rewards = kl_penalized_rewards(scores, kl, mask, self.kl_coef)
        values = torch.zeros_like(rewards) if rollout.values is None else rollout.values
        next_values, terminated = next_decisions(values, mask)
        advantages, returns = compute_gae(
            rewards,
            values,
            next_values,
            terminated,
            torch.zeros_like(terminated),
            gamma=args.gamma,
            gae_lambda=1.0 if args.objective == "reinforce" else args.gae_lambda,
            mask=mask,
        )
        old = Experience(
            logprobs=rollout.logprobs,
            values=rollout.values,
            advantages=masked_whiten(advantages, mask) if args.normalize_advantages else advantages,
            returns=None if rollout.values is None else returns,
            mask=mask,
        )
        reference_kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1").sum(dim=1).mean()
        metrics: dict[str, float] = {
            **score_metrics(rollout),
            "reward/mean_per_response": float(rewards.sum() / rollout.scored.sum()),
            "kl/reference_nats_per_response": float(reference_kl),
            "kl/coef": self.kl_coef,
            "response/length_tokens": float(rollout.lengths.float().mean()),
            "response/eos_fraction": float(rollout.finished.float().mean()),
            "advantage/std": float(masked_var(advantages, mask).sqrt()),
            "policy/clip_range": self.objective.clip_range,
            "policy/penalty_beta": self.objective.penalty_beta,
        }
        if rollout.values is not None:
            metrics["value/explained_variance"] = float(explained_variance(values, returns, mask))
            metrics["value/mean"] = float(masked_mean(values, mask))
            metrics["value/return_mean"] = float(masked_mean(returns, mask))
        if rollout.decode_gap is not None:
            metrics["policy/decode_gap_max_nats"] = rollout.decode_gap
        return old, metrics

    def _accumulate_gradients(
        self, rollout: Rollout, old: Experience, minibatch: Tensor
    ) -> tuple[MetricAverage, dict[str, Tensor]]:
        """Backward over one minibatch in microbatches; the gradient is the same however it is split."""
        denominator = loss_denominator(old.mask[minibatch], self.objective.loss_aggregation)
        actions = MetricAverage()
        losses = {"policy": torch.zeros((), device=self.device), "value": torch.zeros((), device=self.device)}
        for rows in minibatch.split(self.args.microbatch_size or len(minibatch)):
            part = rollout[rows]
            facts = old[rows][:, : part.mask.shape[1]]
            new = self.model(
                part.prompt_ids, part.prompt_mask, part.response_ids, part.mask, temperature=self.args.temperature
            )
            loss = ppo_loss(new, facts, self.objective, denominator=denominator)
            loss.total.backward()
            actions.add(ppo_diagnostics(new, facts, self.objective), weight=facts.mask.sum())
            losses["policy"] += loss.policy.detach()
            losses["value"] += loss.value.detach()
        return actions, losses

    def _check_tripwire(self, first_step: MetricAverage) -> float:
        gap = first_step.compute()["max_abs_log_ratio"]
        if not gap <= self.args.max_initial_log_ratio:
            self.optimizer.zero_grad(set_to_none=True)
            raise RatioTripwireError(
                f"before the first optimizer step some |log(new/old)| is {gap:.3g} nats, above max_initial_log_ratio="
                f"{self.args.max_initial_log_ratio}: sampling and training disagree. Usual causes: weights changed "
                "between rollout() and step(), dropout or another source of noise in the model, a model whose cached "
                "decoding differs from its full forward pass (try recompute_logprobs=True), or low precision "
                "(raise the bound)"
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

    # Rollouts

    def _generator(self, stream: int, number: int, device: torch.device | str | None = None) -> torch.Generator:
        """A generator that depends on seed, purpose and number alone, so that any rollout can be made again."""
        state = np.random.SeedSequence([self.args.seed, stream, number]).generate_state(1, np.uint64)[0]
        return torch.Generator(device or self.device).manual_seed(int(state >> np.uint64(1)))

    def _rollout(self, prompts: Sequence[Prompt], columns: dict[str, list[Any]], generator: torch.Generator) -> Rollout:
        rollout = self._read(self._generate(list(prompts), columns, generator))
        return self._score(rollout)

    def _generate(self, prompts: list[Prompt], columns: dict[str, list[Any]], generator: torch.Generator) -> Rollout:
        rows: list[list[int]] = []
        for i, prompt in enumerate(prompts):
            ids = tokenize_prompt(prompt, self.tokenizer, f"prompt {i}")
            policy = "truncate" if self.args.overlong_prompts == "truncate" else "error"
            rows.append(fit_prompt(ids, self.room, policy, f"prompt {i}") or [])
        prompt_ids, prompt_mask = left_pad(rows, filler=0, device=self.device)
        response_ids, mask, finished, logprobs, values = sample_responses(
            self.model,
            prompt_ids,
            prompt_mask,
            max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.temperature,
            stop_token_ids=self.stop_token_ids,
            generator=generator,
        )
        completions = [
            str(self.tokenizer.decode(ids[keep], skip_special_tokens=True))
            for ids, keep in zip(response_ids, mask, strict=True)
        ]
        return Rollout(
            prompts, columns, prompt_ids, prompt_mask, response_ids, mask, finished, logprobs, values, completions
        )

    @torch.no_grad()
    def _read(self, rollout: Rollout) -> Rollout:
        """Add what decoding did not give: the reference's log-probs, a separate critic's values, or a second look."""
        sequences = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask)
        ref_logprobs = self.reference.logprobs(*sequences, temperature=self.args.temperature)
        changes: dict[str, Any] = {"ref_logprobs": torch.where(rollout.mask, ref_logprobs, 0.0)}
        if rollout.values is None and self.model.value_trunk is not None:
            changes["values"] = self.model.separate_values(*sequences)
        if self.args.recompute_logprobs:
            again = self.model(*sequences, temperature=self.args.temperature, entropy=False)
            logprobs = torch.where(rollout.mask, again.logprobs, 0.0)
            changes |= {"logprobs": logprobs, "values": again.values}
            changes["decode_gap"] = float((logprobs - rollout.logprobs).abs().max())
        return dataclasses.replace(rollout, **changes)

    def _score(self, rollout: Rollout) -> Rollout:
        args = self.args
        parts: dict[str, list[float | None]] = {}
        try:
            for name, (function, _) in self.rewards.items():
                parts[name] = score(
                    function,
                    rollout.prompts,
                    rollout.completions,
                    rollout.columns,
                    timeout_s=args.reward_timeout_s,
                    drop_nonfinite=args.drop_nonfinite_scores,
                )
            weights = [weight for _, weight in self.rewards.values()]
            rows = list(zip(*parts.values(), strict=True))
            if all(None in row for row in rows):
                raise RewardError("no completion was scored by every reward function")
        except RewardError as error:
            file = self.run.path / "failed_rollout.jsonl"
            file.unlink(missing_ok=True)
            for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True):
                self.run.append(file.name, {"prompt": prompt, "completion": completion})
            raise RewardError(f"{error}. The responses are in {file}") from (error.__cause__ or error)
        totals = [
            None if None in row else sum(w * float(s or 0.0) for w, s in zip(weights, row, strict=True)) for row in rows
        ]
        scores = torch.tensor([total or 0.0 for total in totals], dtype=torch.float32, device=self.device)
        scored = torch.tensor([total is not None for total in totals], device=self.device)
        if len(totals) > 1 and torch.unique(scores[scored]).numel() == 1:
            warnings.warn(
                f"every response scored {float(scores[scored][0])}: a constant reward gives no signal to learn from",
                stacklevel=4,
            )
        return dataclasses.replace(rollout, scores=scores, scored=scored, score_parts=parts)

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
        for number, start in enumerate(range(0, len(self.eval_prompts), size)):
            batch = self.eval_prompts.take(range(start, min(start + size, len(self.eval_prompts))))
            rows += describe(self._rollout(batch.prompts, batch.columns, self._generator(_EVAL_STREAM, number)))
        scores = [row["score"] for row in rows if row["score"] is not None]
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
        self.run.log({"progress/iteration": self.iteration, "progress/episodes": self.episodes, **metrics})
        for row in rows:
            self.run.append("eval_samples.jsonl", {"iteration": self.iteration, **row})
        return metrics

    def _report(self, progress: ProgressDisplay, rollout: Rollout, metrics: dict[str, float]) -> None:
        self.run.log(metrics)
        for row in describe(rollout)[: self.args.samples_per_rollout]:
            self.run.append("samples.jsonl", {"iteration": self.iteration, **row})
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
        folder.mkdir(parents=True, exist_ok=True)
        policy: Any = self.model.policy
        if merge_adapter:
            if not hasattr(policy, "merge_and_unload"):
                raise ValueError("merge_adapter=True needs an adapter, but the run has no peft_config")
            import copy

            policy = copy.deepcopy(policy).merge_and_unload()
        policy.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.model.save_critic(folder)
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool = True, merge_adapter: bool = False) -> str:
        """Upload what :meth:`save_model` writes to the Hugging Face hub; returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder, merge_adapter=merge_adapter)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def next_decisions(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """V at each True step's next True step, and the flag of the last one: both [B, T].

    The last True step closes the episode, whether a stop token or the length limit ended it, so its own entry is 0.
    """
    next_values, terminated = torch.zeros_like(values), torch.zeros_like(mask)
    upcoming = torch.zeros_like(values[:, 0])
    found = torch.zeros_like(mask[:, 0])
    for t in reversed(range(mask.shape[1])):
        next_values[:, t] = upcoming
        terminated[:, t] = mask[:, t] & ~found
        upcoming = torch.where(mask[:, t], values[:, t], upcoming)
        found = found | mask[:, t]
    return next_values, terminated


def score_metrics(rollout: Rollout) -> dict[str, float]:
    """Mean and spread of a rollout's scores, and each reward function's own mean."""
    assert rollout.scores is not None and rollout.scored is not None
    scores = rollout.scores[rollout.scored]
    metrics = {
        "score/mean": float(scores.mean()),
        "score/std": float(scores.std(correction=0)),
        "score/unscored_fraction": float((~rollout.scored).float().mean()),
    }
    for name, part in rollout.score_parts.items():
        metrics[f"score/part/{name}"] = float(np.mean([value for value in part if value is not None]))
    return metrics


def describe(rollout: Rollout) -> list[dict[str, Any]]:
    """One row per response: prompt, completion, score (None where unscored), KL in nats, surprise, tokens, finished."""
    assert rollout.ref_logprobs is not None and rollout.scores is not None and rollout.scored is not None
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1").sum(dim=1).tolist()
    surprise = (-rollout.ref_logprobs.sum(dim=1) / rollout.lengths).tolist()
    scored, scores = rollout.scored.tolist(), rollout.scores.tolist()
    lengths, finished = rollout.lengths.tolist(), rollout.finished.tolist()
    return [
        {
            "prompt": prompt,
            "completion": completion,
            "score": scores[i] if scored[i] else None,
            "kl_nats": kl[i],
            "reference_nats_per_token": surprise[i],
            "tokens": lengths[i],
            "finished": finished[i],
        }
        for i, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True))
    ]
