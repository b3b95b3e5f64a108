"""What a run shows of itself: evaluations on held-out prompts, metric lines, samples and timings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.progress import ProgressDisplay, model_rows
from rlhf_ppo.runtime.seeding import EVALUATION, global_rng_state, numbered_generator, restore_rng_state
from rlhf_ppo.training.experience import describe
from rlhf_ppo.training.resume import keep_checkpoint

if TYPE_CHECKING:
    from rlhf_ppo.trainer import PPOTrainer

PANELS = {
    "score/mean": "score",
    "kl/reference_nats_per_response": "KL to the reference (nats per response)",
    "policy/entropy": "entropy (nats per token)",
    "value/explained_variance": "critic: explained variance",
}
"""What the picture of a run's end shows."""


def run_rows(trainer: PPOTrainer) -> dict[str, str]:
    """What the run is about to do, for the summary at its start."""
    args, parts = trainer.args, trainer.parts
    size, whole = args.rollout_batch_size, args.num_rollouts
    steps = args.num_optimizer_steps - trainer.optimizer_steps
    more = "more " if trainer.iteration else ""
    rollouts = f"{whole - trainer.iteration} {more}rollout{'s' if whole - trainer.iteration != 1 else ''}"
    run = f"{rollouts} of {size} responses, {'at most ' if args.target_kl else ''}{steps} optimizer steps"
    if whole * size != args.total_episodes:
        run += f" (total_episodes={args.total_episodes} rounds up to {whole * size}: whole rollouts of {size})"
    sets = {"train": trainer.train_prompts, "evaluation": trainer.eval_prompts}
    return {
        **model_rows(trainer.sources["model"] or "object", trainer.model, device=trainer.device, bf16=parts.bf16),
        "reward": ", ".join(parts.rewards),
        "prompts": ", ".join(f"{len(prompts)} {name}" for name, prompts in sets.items() if prompts is not None),
        "run": run,
        "folder": str(trainer.run.path),
    }


def evaluate(trainer: PPOTrainer) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of :meth:`rlhf_ppo.PPOTrainer.evaluate`, and a row for each response."""
    prompts, args = trainer.eval_prompts, trainer.args
    if prompts is None:
        raise ValueError("evaluate() needs an eval_dataset with a column 'prompt'")
    size = args.rollout_batch_size
    rows: list[dict[str, Any]] = []
    # What rewards draw here from global generators must not shift what they draw in training.
    generators = global_rng_state()
    for number, start in enumerate(range(0, len(prompts), size)):
        batch = prompts.take(range(start, min(start + size, len(prompts))))
        generator = numbered_generator(args.seed, EVALUATION, number, trainer.device)
        # A short last batch may happen to have no score; only a whole evaluation without one says nothing.
        rows += describe(trainer.collector.collect(batch.prompts, batch.columns, generator, needs_scores=False))
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


def log_evaluation(trainer: PPOTrainer) -> dict[str, float]:
    """Evaluate, if there is an ``eval_dataset``, write it down, and keep a checkpoint of the best (``save_best``)."""
    if trainer.eval_prompts is None:
        return {}
    metrics, rows = evaluate(trainer)
    score = metrics["eval/score_mean"]
    if trainer.iteration > 0 and (trainer.best is None or score > trainer.best["eval/score_mean"]):
        trainer.best = {"iteration": trainer.iteration, "eval/score_mean": score}
        if trainer.args.save_best:
            keep_checkpoint(trainer)
    trainer.run.log({"progress/iteration": trainer.iteration, "progress/episodes": trainer.episodes, **metrics})
    for row in rows:
        trainer.run.append("eval_samples.jsonl", {"iteration": trainer.iteration, **row})
    return metrics


def log_update(trainer: PPOTrainer, rollout: Rollout, metrics: dict[str, float], progress: ProgressDisplay) -> None:
    """Write down an update that was just made, and show it."""
    run, iteration = trainer.run, trainer.iteration
    # Where no step was finite, some averages have nothing to average.
    run.log({name: value for name, value in metrics.items() if math.isfinite(value)})
    for row in describe(rollout)[: trainer.args.samples_per_rollout]:
        run.append("samples.jsonl", {"iteration": iteration, **row})
    tokens = int(rollout.lengths.sum())
    run.append("timings.jsonl", {"iteration": iteration, "generated_tokens": tokens, **trainer.timings})
    progress.update(
        trainer.episodes,
        score=metrics["score/mean"],
        kl=metrics["kl/reference_nats_per_response"],
        entropy=metrics["policy/entropy"],
        clipped=metrics["policy/clip_fraction"],
    )
