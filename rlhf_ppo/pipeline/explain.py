"""Explain a rollout of a run, token by token: one that was recorded, one of a black box, or one sampled anew."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_ppo.config.arguments.commands import ExplainArgs
from rlhf_ppo.config.arguments.inference import GenerateArgs
from rlhf_ppo.config.rlhf import RLHFConfig, restore_settings
from rlhf_ppo.data.chat import Completion, Prompt
from rlhf_ppo.data.prompts import PromptBatch
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.compare import OBJECT
from rlhf_ppo.models.loading import load_policy, resolve_model
from rlhf_ppo.pipeline.rebuild import find_tokenizer, model_facts_of, rebuild_actor_critic, source_of
from rlhf_ppo.pipeline.replay import build_models, on_device
from rlhf_ppo.pipeline.run_again import is_model, trainer_of
from rlhf_ppo.rewards.functions import require_accepts_columns
from rlhf_ppo.runtime.checkpoints.checkpoint import list_checkpoints, read_checkpoint
from rlhf_ppo.runtime.checkpoints.resume import newest_good
from rlhf_ppo.runtime.explain import Explanation, cell
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.machine.device import resolve_device
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.runtime.processes.launch import require_one_process
from rlhf_ppo.runtime.report.heat import Told, explained_rows, make_views
from rlhf_ppo.runtime.report.page import write_heat_page
from rlhf_ppo.runtime.seeding import TRAIN, numbered_generator
from rlhf_ppo.runtime.texts import display_text, printable
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.training.checkpoints.black_box import read_black_box
from rlhf_ppo.training.optimizer import critic_warmup_settings
from rlhf_ppo.training.recorded.recorded_rollouts import MANIFEST, Recording, open_recording, recording_folder
from rlhf_ppo.training.reports.explain import explain_scored, logprobs_now
from rlhf_ppo.training.rewards import ScoreStatistics, shape_rewards
from rlhf_ppo.training.rollouts.collect import collect, make_batch

_PASS_TOKENS = 1024
"""Tokens of a forward pass that reads a recorded rollout."""


@dataclass(frozen=True)
class ExplainedRollout:
    """A rollout of B responses, and what PPO computes about each of its tokens."""

    title: str
    """Where the rollout comes from, and which policy its ratios are of."""
    prompts: Sequence[Prompt]
    completions: Sequence[Completion]
    scores: Sequence[float | None]
    """[B] None where unscored."""
    explanation: Explanation
    """``sequence`` is the response's number, from 0."""


def explain_run(args: ExplainArgs) -> ExplainedRollout:
    """Explain a rollout of a run.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no such rollout, response or prompt, or a run that does not say how to sample anew.
    """
    folder = Path(args.run)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: name a run's folder")
    if folder.name.startswith("blackbox-"):
        return _of_black_box(folder, args)
    recording = open_recording(folder) if (recording_folder(folder) / MANIFEST).is_file() else None
    if args.sample is None and recording is not None and args.rollout in (None, *recording.numbers):
        return _of_recording(recording, args.rollout or recording.numbers[-1], args)
    if args.rollout is None:
        return _sampled(folder, args)
    box = folder / f"blackbox-{args.rollout}"
    if not box.is_dir():
        numbers = [] if recording is None else recording.numbers
        recorded = f"rollouts {numbers[0]} to {numbers[-1]}" if numbers else "no rollouts"
        raise ValueError(
            f"{folder} has recorded {recorded}, and there is no {box.name}: record rollouts with save_rollouts, or "
            "leave rollout out"
        )
    return _of_black_box(box, args)


def _explained(title: str, rollout: Rollout, explanation: Explanation) -> ExplainedRollout:
    assert rollout.scores is not None and rollout.scored is not None
    scores = [x if ok else None for x, ok in zip(rollout.scores.tolist(), rollout.scored.tolist(), strict=True)]
    return ExplainedRollout(title, rollout.prompts, rollout.completions, scores, explanation)


def _of_recording(recording: Recording, number: int, args: ExplainArgs) -> ExplainedRollout:
    """Explain a recorded rollout, with the coefficients that metrics.jsonl has of its update."""
    run = recording.folder.parent
    settings = restore_settings(recording.facts.settings)
    metrics = _metrics_of(run, number)
    objective = dataclasses.replace(
        settings,
        **{name: metrics[key] for name, key in _moved_coefficients(settings).items() if key in metrics},
    )
    if number <= settings.critic_warmup_rollouts:
        objective = critic_warmup_settings(objective)
    place = number - recording.numbers[0]
    device = resolve_device(args.device)
    statistics = ScoreStatistics()
    for earlier in range(place) if settings.normalize_scores else ():
        statistics.add(recording.read(earlier, device))
    rollout = recording.read(place, device)
    start = None if recording.facts.model == OBJECT else recording.facts.model
    name = resolve_model(args.model or start)
    model, said = _policy_after(run, number, name)
    now = None
    if model is not None:
        model = model.to(device)
        passes = rollout.batches(range(len(rollout.prompts)), _PASS_TOKENS, padded=not model.runner.packs_on(device))
        bf16 = recording.facts.fingerprints["bf16"]
        with torch_threads(args.num_threads, model):
            now = logprobs_now(model, rollout, passes, temperature=settings.temperature, bf16=bf16)
    rewards = shape_rewards(rollout, objective, metrics.get("kl/coef", settings.kl_coef), statistics)
    tokenizer = find_tokenizer(run, name)
    explanation = explain_scored(rollout, rewards, objective, tokenizer, objective=objective, new_logprobs=now)
    return _explained(f"rollout {number}, recorded in {recording.folder}; {said}", rollout, explanation)


def _metrics_of(run: Path, iteration: int) -> dict[str, Any]:
    """Return what metrics.jsonl has of an update; {} if nothing."""
    lines = RunDirectory(run).read()
    return next((x for x in lines if x.get("progress/iteration") == iteration and "policy/loss" in x), {})


def _moved_coefficients(settings: RLHFConfig) -> dict[str, str]:
    """Return the settings that a controller moves -> where metrics have them."""
    moved = {"adaptive_clip": {"clip_range": "policy/clip_range"}, "penalty": {"penalty_beta": "policy/penalty_beta"}}
    return moved.get(settings.objective, {})


def _policy_after(run: Path, number: int, name: str | None) -> tuple[ActorCritic | None, str]:
    """Load the policy after an update, else the newest that the folder holds; returns it and which it is, in words."""
    there = {folder.name: folder for folder in list_checkpoints(run)}
    exact = there.get(f"checkpoint-{number}")
    checkpoint = read_checkpoint(exact) if exact is not None else newest_good(run)
    if checkpoint is not None:
        said = f"ratios: of the policy in {checkpoint.folder.name} to the one that sampled"
        return rebuild_actor_critic(checkpoint, source_of(model_facts_of(checkpoint), name)), said
    if is_model(run):
        return ActorCritic(load_policy(str(run)), critic=False), "ratios: of the saved model to the policy that sampled"
    return None, "no ratios: the folder holds no later policy"


def _of_black_box(folder: Path, args: ExplainArgs) -> ExplainedRollout:
    """Explain the rollout of a black box, with the policy as it was before the step that failed."""
    box = read_black_box(folder)
    device = resolve_device(args.device)
    model, _ = build_models(box, args.model, device)
    box = on_device(box, device)
    rollout, settings = box.rollout, box.objective
    passes = rollout.batches(range(len(rollout.prompts)), _PASS_TOKENS, padded=not model.runner.packs_on(device))
    with torch_threads(args.num_threads, model):
        now = logprobs_now(model, rollout, passes, temperature=settings.temperature, bf16=box.bf16)
    rewards = shape_rewards(rollout, settings, box.kl_coef, box.score_statistics)
    tokenizer = find_tokenizer(folder.parent, source_of(box.models, args.model))
    explanation = explain_scored(rollout, rewards, settings, tokenizer, objective=settings, new_logprobs=now)
    before = f"ratios: of the policy before optimizer step {box.step} to the one that sampled"
    return _explained(f"rollout {box.iteration}, of the black box {folder}; {before}", rollout, explanation)


def _sampled(folder: Path, args: ExplainArgs) -> ExplainedRollout:
    """Explain new responses to a prompt of the run's training data."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer, policy = trainer_of(folder, scratch, model=args.model, device=args.device)
        prompts, number = trainer.fixed.train_prompts, args.sample or 0
        assert prompts is not None
        if number >= len(prompts):
            raise ValueError(f"sample={number} is beyond the run's {len(prompts)} training prompts, numbered from 0")
        explained = _sample(trainer, prompts.take([number]), args.seed, args.num_threads)
    title = f"new responses to prompt {number} of the training data, sampled from {policy}"
    return dataclasses.replace(explained, title=title)


def _sample(trainer: PPOTrainer, batch: PromptBatch, seed: int, num_threads: int | None) -> ExplainedRollout:
    run, model = trainer.fixed, trainer.model
    batch = make_batch(batch.prompts, batch.columns, copies=run.args.num_generations)
    with torch_threads(num_threads, model):
        rollout = collect(run, model, batch, numbered_generator(seed, TRAIN, 0, run.device))
        return _explained("", rollout, trainer.explain(rollout))


def explain_completions(args: GenerateArgs) -> None:
    """Run `generate --explain`: complete prompts as a run would, and show the completions token by token.

    Raises:
        ValueError: the model is no run of `train`, or its rewards need more than a prompt.
    """
    require_one_process("generate --explain", "it explains a few completions")
    with tempfile.TemporaryDirectory() as scratch:
        trainer, policy = trainer_of(Path(args.model), scratch, model=None, device=args.device)
        for name, (function, _) in trainer.fixed.rewards.items():
            require_accepts_columns(function, name, (), "--prompt")
        found = _sample(trainer, PromptBatch(list(args.prompt), {}), args.seed, args.num_threads)
    found = dataclasses.replace(found, title=f"sampled from {policy}")
    print_explained(found, range(len(found.prompts)), html=args.html)


def explain_command(args: ExplainArgs) -> None:
    """Run the `explain` command."""
    found = explain_run(args)
    if (last := max(args.responses)) >= len(found.prompts):
        raise ValueError(f"responses names {last}, but the rollout has {len(found.prompts)}, numbered from 0")
    print_explained(found, args.responses, html=args.html)


def print_explained(
    found: ExplainedRollout, responses: Sequence[int], console: Console | None = None, *, html: str | None = None
) -> None:
    """Print responses token by token: a table in colours on a terminal, plain columns elsewhere.

    ``html``: also write them into this file.
    """
    console = console or Console(markup=False, emoji=False, highlight=False)
    console.print(found.title, soft_wrap=True)
    for number in responses:
        score = found.scores[number]
        said = printable(f"{display_text(found.prompts[number])}|{display_text(found.completions[number])}")
        console.print(f"\nresponse {number}, score {'none' if score is None else f'{score:.4g}'}", soft_wrap=True)
        console.print(said, soft_wrap=True)
        one = found.explanation.of(number)
        if not one.rows:
            console.print("left out of the update (unscored, or its prompt's responses all score alike)")
        elif console.is_terminal:
            console.print(_table(one))
        else:
            console.print(printable(one.text(max_rows=None)), soft_wrap=True)

    if html is not None:
        console.print(f"\npage     {_write_page(found, responses, html)}", soft_wrap=True)


def _write_page(found: ExplainedRollout, responses: Sequence[int], file: str) -> Path:
    told = []
    for number in responses:
        score = found.scores[number]
        said = "unscored: nothing is learned from it" if score is None else f"score {score:.4g}"
        rows = explained_rows(found.explanation, number, quoted=True)
        told.append(Told(rows, f"Response {number}", display_text(found.prompts[number]), said))
    return write_heat_page(file, make_views(told), heading="Token by token", lead=found.title)


def _table(explanation: Explanation) -> Table:
    """Return the rows of one response as a table: green where an action is reinforced, red where it is discouraged."""
    columns = [column for column in explanation.columns if column != "sequence"]
    table = Table(*columns, box=None, padding=(0, 1), header_style="bold")
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for row in explanation.rows:
        styles = {
            "label": "green" if row["weight"] > 0 else "red" if row["weight"] < 0 else "",
            "ratio": "yellow" if row["clipped"] else "",
            "clipped": "yellow",
            "gradient_alive": "" if row["gradient_alive"] else "bright_black",
        }
        styles["advantage"] = styles["weight"] = styles["label"]
        table.add_row(*(Text(printable(cell(row[column])), style=styles.get(column, "")) for column in columns))
    return table
