"""Reporting: evaluations on held-out prompts, metric lines, samples, timings and the run's summary."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from rlhf_ppo.core import kl_estimate
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.logs.lines import LOGGER
from rlhf_ppo.runtime.logs.panel import LANGUAGE_MODEL, RunPanel
from rlhf_ppo.runtime.logs.progress import Phases, ProgressDisplay, model_rows
from rlhf_ppo.runtime.package import versions
from rlhf_ppo.runtime.plots import plot_at_end
from rlhf_ppo.runtime.report.curves import LANGUAGE, panels
from rlhf_ppo.runtime.report.page import report_at_end
from rlhf_ppo.runtime.seeding import EVALUATION, global_rng_state, numbered_generator, restore_rng_state
from rlhf_ppo.runtime.texts import display_text
from rlhf_ppo.training.checkpoints.resume import SafePoint, keep_checkpoint
from rlhf_ppo.training.rollouts.collect import collect
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState

PANELS = panels(LANGUAGE)
"""What the run's final plot shows."""


_OFF_POLICY = (
    "The first update is the recorded run's own; later ones are off-policy: another policy sampled their responses"
)


def run_settings(run: Run) -> dict[str, Any]:
    """Return the settings, and where the models came from, for run.json and trackers."""
    return {**run.sources, **dataclasses.asdict(run.args)}


def run_facts(run: Run) -> dict[str, Any]:
    """Return what run.json holds."""
    return {
        "reward": run.reward_sources,
        **run_settings(run),
        "learning_rates": run.learning_rates,
        "versions": versions("torch", "transformers", "peft"),
        "fingerprints": run.fingerprints,
    }


def require_rollouts_left(state: TrainState, run: Run) -> None:
    """Check that there are prompts and that rollouts are left; warn if a rollout repeats prompts."""
    args, prompts = run.args, run.train_prompts
    if prompts is None and run.recording is None:
        raise ValueError("train() needs a train_dataset with a column 'prompt'")
    wanted = args.rollout_batch_size // args.num_generations
    if prompts is not None and len(prompts) < wanted:
        warnings.warn(
            f"train_dataset has {len(prompts)} prompts, fewer than the {wanted} of a rollout "
            f"(rollout_batch_size={args.rollout_batch_size}): each rollout repeats some",
            stacklevel=3,
        )
    elif prompts is not None and (window := prompts.order.window(state.iteration)) < wanted:
        warnings.warn(
            f"the curriculum's next rollout draws from {window} of {len(prompts)} prompts, fewer than the {wanted} "
            "that it takes: it repeats some; raise curriculum_start, or lower rollout_batch_size",
            stacklevel=3,
        )
    if state.iteration >= args.num_rollouts:
        raise ValueError(
            f"all {args.num_rollouts} rollouts of this run are done: raise total_episodes in a new trainer"
        )


def is_due(every: int, iteration: int, *, last: bool = False) -> bool:
    """Whether something done every ``every`` iterations (0: never) is due; always after the ``last`` one."""
    return every > 0 and (last or iteration % every == 0)


def resumed_metrics(state: TrainState, run: Run) -> dict[str, float]:
    """Return the last metrics of a run that was killed after its last rollout: only its end is left to write."""
    lines = run.folder.read() if state.iteration >= run.args.num_rollouts else []
    return lines[-1] if lines else {}


def plot_run(run: Run) -> None:
    """Plot the run's metrics into curve.png."""
    file = run.folder.path / "curve.png"
    if run.folder.writes:
        plot_at_end(run.folder.read(), file, x="progress/episodes", panels=PANELS, title="PPO, scores and KL")


def report_run(run: Run) -> None:
    """Write report.html, unless the settings say otherwise."""
    if run.folder.writes and run.args.report:
        report_at_end(run.folder.path, quiet=run.args.quiet)


def run_rows(state: TrainState, run: Run) -> dict[str, str]:
    """Return what the run is about to do, for the summary at its start."""
    args, size, whole = run.args, run.args.rollout_batch_size, run.args.num_rollouts
    steps = args.num_optimizer_steps - state.optimizer_steps
    more = "more " if state.iteration else ""
    rollouts = f"{whole - state.iteration} {more}rollout{'s' if whole - state.iteration != 1 else ''}"
    text = f"{rollouts} of {size} responses, {'at most ' if args.target_kl else ''}{steps} optimizer steps"
    if whole * size != args.total_episodes:
        text += f" (total_episodes={args.total_episodes} rounds up to {whole * size}: whole rollouts of {size})"
    sets = {"train": run.train_prompts, "evaluation": run.eval_prompts}
    replay = {} if run.recording is None else {"replay": f"{run.recording.folder}. {_OFF_POLICY}"}
    return {
        **model_rows(run.sources["model"] or "object", state.model, device=run.device, bf16=run.bf16),
        **({} if run.processes.alone else {"processes": run.plan.words}),
        "reward": ", ".join(run.rewards),
        "prompts": ", ".join(f"{len(prompts)} {name}" for name, prompts in sets.items() if prompts is not None),
        "run": text,
        **replay,
        "learning rate": run.learning_rates,
        "folder": str(run.folder.path),
    }


def log_traffic(state: TrainState, run: Run, *, since: int) -> None:
    """Say what the processes exchanged in an update, beside the least that several processes must.

    Args:
        state, run: at the end.
        since: the iteration at which these processes began: others' rows have other counts, or none.
    """
    rows = [row for row in run.folder.read("timings.jsonl") if row["iteration"] > since]
    if run.processes.alone or run.args.quiet or len(rows) < 2:
        return
    # The first rows also count the set-up and an evaluation.
    updates = len(rows) - 1
    exchanged = (rows[-1]["exchanged_bytes"] - rows[0]["exchanged_bytes"]) / updates
    steps = state.optimizer_steps / max(1, state.iteration)
    gradients = steps * sum(p.nbytes for p in state.model.trainable_parameters())
    LOGGER.info(
        "each process contributed %.3g MB an update to what the processes exchanged; the gradients alone, once an "
        "optimizer step, are %.3g MB",
        exchanged / 1e6,
        gradients / 1e6,
    )


@contextmanager
def shown_progress(state: TrainState, run: Run) -> Iterator[ProgressDisplay]:
    """Show the run's progress, and the phase it is in, while the block lasts."""
    panel = RunPanel(LANGUAGE_MODEL, dataclasses.asdict(run.args), bf16=run.bf16)
    with (
        ProgressDisplay("episodes", run.planned_episodes, quiet=run.args.quiet, panel=panel) as progress,
        run.stopwatch.shown_by(progress.phase),
    ):
        progress.start(state.episodes)
        yield progress


def evaluate(state: TrainState, run: Run) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the metrics of :meth:`rlhf_ppo.PPOTrainer.evaluate`, and a row for each response."""
    prompts, args = run.eval_prompts, run.args
    if prompts is None:
        raise ValueError("evaluate() needs an eval_dataset with a column 'prompt'")
    size = args.rollout_batch_size
    rows: list[dict[str, Any]] = []
    logged: dict[str, list[tuple[float, int]]] = {}
    # What rewards draw here from global generators must not shift what they draw in training.
    generators = global_rng_state()
    for number, start in enumerate(range(0, len(prompts), size)):
        batch = prompts.take(range(start, min(start + size, len(prompts))))
        generator = numbered_generator(args.seed, EVALUATION, number, run.device)
        # A short last batch may have no score at all; only a whole evaluation without one is an error.
        rollout = collect(run, state.model, batch, generator, needs_scores=False)
        rows += describe(rollout)
        for name, value in rollout.logged_metrics.items():
            logged.setdefault(name, []).append((value, len(batch.prompts)))
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
        **{f"eval/logged/{name}": _weighted_mean(parts) for name, parts in logged.items()},
    }, rows


def _weighted_mean(parts: list[tuple[float, int]]) -> float:
    """Return the mean of (number, weight) pairs."""
    return sum(x * weight for x, weight in parts) / sum(weight for _, weight in parts)


def log_evaluation(state: TrainState, run: Run, safe: SafePoint, progress: ProgressDisplay) -> dict[str, float]:
    """Evaluate and log, if there is an ``eval_dataset``; save a checkpoint of the best so far under ``save_best``."""
    if run.eval_prompts is None:
        return {}
    with progress.aside("evaluating"):
        metrics, rows = evaluate(state, run)
        score = metrics["eval/score_mean"]
        if state.iteration > 0 and (state.best is None or score > state.best["eval/score_mean"]):
            state.best = {"iteration": state.iteration, "eval/score_mean": score}
            if run.args.save_best:
                # Before the lines below: a run that resumes from it evaluates again.
                keep_checkpoint(state, run, safe)
        run.folder.log({"progress/iteration": state.iteration, "progress/episodes": state.episodes, **metrics})
        _log_samples(state, run, "eval_samples.jsonl", rows)
    return metrics


def log_update(
    state: TrainState,
    run: Run,
    rollout: Rollout,
    metrics: dict[str, float],
    phases: Phases,
    progress: ProgressDisplay,
) -> None:
    """Log an update: its metrics, some samples, and what each phase of the iteration took."""
    folder, iteration = run.folder, state.iteration
    # Where no step was finite, some averages are undefined.
    folder.log({name: value for name, value in metrics.items() if math.isfinite(value)})
    rows = describe(rollout)
    _log_samples(state, run, "samples.jsonl", rows[: run.args.samples_per_rollout])
    tokens = int(rollout.lengths.sum())
    row: dict[str, Any] = {"iteration": iteration, "generated_tokens": tokens, **phases.seconds}
    if phases.peak_bytes:
        row["peak_bytes"] = phases.peak_bytes
    if not run.processes.alone:
        row["exchanged_bytes"] = run.processes.bytes_exchanged
    folder.append("timings.jsonl", row)
    sample = rows[iteration % len(rows)]
    progress.show(
        {**metrics, "speed": tokens / max(1e-9, sum(phases.seconds.values()))},
        (display_text(sample["prompt"]), display_text(sample["completion"]), sample["score"]),
    )
    progress.update(
        state.episodes,
        score=metrics["score/mean"],
        kl=metrics["kl/reference_nats_per_response"],
        entropy=metrics["policy/entropy"],
        clipped=metrics["policy/clip_fraction"],
    )


def _log_samples(state: TrainState, run: Run, file: str, rows: list[dict[str, Any]]) -> None:
    run.folder.log_samples(file, rows, iteration=state.iteration, step=state.episodes)


def describe(rollout: Rollout) -> list[dict[str, Any]]:
    """Return a row per response: prompt, completion, score (None where unscored), KL, surprise, tokens, finished.

    Then what reward functions logged about it.
    """
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
            **({} if rollout.turns is None else {"turns": int(rollout.turns[i].max()) + 1}),
            **{column: values[i] for column, values in rollout.logged_columns.items()},
        }
        for i, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True))
    ]
