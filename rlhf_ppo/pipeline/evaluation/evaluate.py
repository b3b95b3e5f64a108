"""Evaluate a model against its reference on held-out prompts, every measure with its uncertainty."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_ppo.config.arguments.inference import EvaluateArgs
from rlhf_ppo.config.arguments.train import require_reward
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.chat import Completion
from rlhf_ppo.data.mixtures import load_data
from rlhf_ppo.data.rows import Rows, prompt_rows
from rlhf_ppo.data.template_options import TemplateDefaults, template_of_rows
from rlhf_ppo.data.tokenization import require_room
from rlhf_ppo.generation.tools.schemas import tool_functions
from rlhf_ppo.models.loading import load_config, prompt_room, resolve_model, vocabulary_size
from rlhf_ppo.pipeline.evaluation.evaluation_settings import (
    find_environment,
    find_reference,
    find_respond,
    sampler_config,
    was_trained_on_judge,
)
from rlhf_ppo.pipeline.evaluation.intervals import win_rate
from rlhf_ppo.pipeline.generate import require_prompts
from rlhf_ppo.runtime.command_line.user_code import load_factory
from rlhf_ppo.runtime.logs.progress import ProgressDisplay
from rlhf_ppo.runtime.logs.run_directory import RunDirectory, read_run
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.runtime.processes.join import join_for
from rlhf_ppo.runtime.processes.voice import first_alone
from rlhf_ppo.runtime.seeding import EVALUATION, numbered_generator
from rlhf_ppo.runtime.statistics import differences, interval
from rlhf_ppo.runtime.texts import distinct
from rlhf_ppo.training.reports.reporting import describe
from rlhf_ppo.training.rollouts.collect import collect
from rlhf_ppo.training.setup import set_up


def evaluate(args: EvaluateArgs) -> dict[str, Any]:
    """Sample both models on the same prompts, measure, and write evaluation.json and evaluation_samples.jsonl.

    Returns:
        What evaluation.json holds: ``model``, ``against`` and ``difference`` (paired by prompt) with {mean, half_width}
        of each measure, ``win_rate`` with its interval (see :mod:`rlhf_ppo.pipeline.evaluation.intervals`).
    Raises:
        ValueError: bad settings, data or models, no reference found, or a judge that scores nothing.
        RewardError: a reward function failed.
    """
    processes = join_for(args)
    args = args if processes.first else dataclasses.replace(args, quiet=True)
    load_config(resolve_model(args.model))  # a missing model is said before what its folder lacks
    settings = read_run(args.model)
    reference = args.ref_model or find_reference(args.model, settings)
    against = args.against or reference
    _require_one_vocabulary(model=args.model, reference=reference, against=against)
    named = find_environment(args, settings)
    require_reward(args.reward, named)
    rows = _load_prompts(args, required=named is None)
    environment = None if named is None else load_factory(named, "environment")
    config = sampler_config(args, settings)
    partner = {**find_respond(args, settings, config.max_turns), "environment": environment}
    # A prompt that the second model cannot read is reported before the first one samples.
    require_room(prompt_room(load_config(resolve_model(against)), config.max_new_tokens), config.max_new_tokens)
    if "prompt" in rows.column_names:
        schemas = [schema for _, schema in tool_functions(partner["tools"]).values()]
        templates = template_of_rows(rows, TemplateDefaults(config.chat_template_kwargs, schemas))
        require_prompts(rows["prompt"], rows.names, templates, against, config.max_new_tokens, config.chat_template)
    run = RunDirectory(args.output_dir)
    ours, theirs = (sample(name, reference, args, config, rows, partner) for name in (args.model, against))
    report = {
        "prompts": len(rows),
        "reference": reference,
        "judge": args.judge,
        "judge_was_trained_on": was_trained_on_judge(args, settings),
        "interval": "95 %: 1.96 standard errors over prompts; win rate: Wilson's",
        **_compare(args.model, ours, against, theirs),
    }
    processes.on_first(lambda: _write(run, report, ours, theirs))
    return report


def _load_prompts(args: EvaluateArgs, *, required: bool) -> Rows:
    rows = prompt_rows(load_data(args, seed=args.seed), args.prompt_column, required=required)
    return rows if args.num_prompts is None else rows.select(range(min(args.num_prompts, len(rows))))


def _require_one_vocabulary(**models: str) -> None:
    """Raise a ValueError unless the vocabularies have one size: the KL compares log-probs token by token."""
    sizes = {name: vocabulary_size(load_config(resolve_model(model))) for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} ({models[name]}) {size}" for name, size in sizes.items())
        raise ValueError(f"vocabularies differ, in tokens: {found}; use models of one tokenizer")


def sample(
    model: str, reference: str, args: EvaluateArgs, config: RLHFConfig, rows: Rows, partner: dict[str, Any]
) -> list[dict[str, Any]]:
    """Sample a response to each prompt; ``partner``: what answers its turns, ``respond``, ``tools`` or
    ``environment``.

    Returns:
        A row per prompt: that of :func:`rlhf_ppo.training.reports.reporting.describe`, each reward's own score, and the
        verdict (the judge's score, or without a judge the sum of the rewards).
    """
    run, policy = set_up(
        model,
        [*args.reward, *([] if args.judge is None else [args.judge])],
        config,
        train_dataset=None,
        eval_dataset=rows,
        processing_class=None,
        ref_model=reference,
        value_model=None,
        peft_config=None,
        **partner,
        trains=False,
    )
    assert run.eval_prompts is not None
    found: list[dict[str, Any]] = []
    with (
        torch_threads(args.num_threads, policy),
        ProgressDisplay(f"prompts of {Path(model).name}", len(rows), each="batch", quiet=args.quiet) as progress,
        run.stopwatch.shown_by(progress.phase),
    ):
        for number, start in enumerate(range(0, len(rows), args.batch_size)):
            # Numbered: conversations draw more often where they are longer, and each process holds its own.
            generator = numbered_generator(args.seed, EVALUATION, number, run.device)
            batch = run.eval_prompts.take(range(start, min(start + args.batch_size, len(rows))))
            rollout = collect(run, policy, batch, generator, needs_scores=False)
            for i, row in enumerate(describe(rollout)):
                scores = {name: part[i] for name, part in rollout.score_parts.items()}
                verdict = row["score"] if args.judge is None else list(scores.values())[-1]
                found.append({**row, "rewards": scores, "verdict": verdict})
            progress.update(len(found))
    return found


def _compare(
    model: str, ours: Sequence[dict[str, Any]], against: str, theirs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Compute the report's measures of both models, their paired differences and the win rate, from their samples."""
    measures = _measures(ours), _measures(theirs)
    return {
        "model": _summary(model, ours, measures[0]),
        "against": _summary(against, theirs, measures[1]),
        "difference": {name: interval(differences(measures[0][name], measures[1][name])) for name in measures[0]},
        "win_rate": win_rate(*([row["verdict"] for row in part] for part in (ours, theirs))),
    }


def _measures(part: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Return each measure's values, one per prompt."""
    return {
        **{f"reward: {name}": [row["rewards"][name] for row in part] for name in part[0]["rewards"]},
        "KL to the reference, nats per response": [row["kl_nats"] for row in part],
        "length, tokens": [float(row["tokens"]) for row in part],
        "ended by a stop token, share": [float(row["finished"]) for row in part],
        **({"turns": [float(row["turns"]) for row in part]} if "turns" in part[0] else {}),
    }


def _summary(name: str, part: Sequence[dict[str, Any]], measures: dict[str, list[float | None]]) -> dict[str, Any]:
    texts = [_spoken(row["completion"]) for row in part]
    return {
        "name": name,
        **{measure: interval(values) for measure, values in measures.items()},
        **{f"distinct-{n}": distinct(texts, n) for n in (1, 2, 3)},
    }


def _spoken(completion: Completion) -> str:
    """Return a completion as text; of a chat the assistant's messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion if message["role"] == "assistant")


def _write(
    run: RunDirectory, report: dict[str, Any], ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> None:
    """Write evaluation_samples.jsonl, a row per prompt with both models' responses, then evaluation.json."""
    file = run.path / "evaluation_samples.jsonl"
    file.unlink(missing_ok=True)
    for pair in zip(ours, theirs, strict=True):
        model, other = ({name: value for name, value in row.items() if name != "prompt"} for row in pair)
        run.append(file.name, {"prompt": pair[0]["prompt"], "model": model, "against": other})
    run.write_json("evaluation.json", report)


def print_evaluation(report: dict[str, Any], *, console: Console | None = None) -> None:
    """Print the report as a table, the win rate and who judged."""
    table = Table(title=f"{report['prompts']} prompts, 95 % intervals", title_justify="left")
    table.add_column("")
    for side in ("model", "against"):
        table.add_column(Text(report[side]["name"]), justify="right")  # as Text: a folder t[/y] is no markup
    table.add_column("difference, paired", justify="right")
    for name, difference in report["difference"].items():
        numbers = [_number(report[side][name]) for side in ("model", "against")]
        table.add_row(Text(name), *numbers, _number(difference, "+"))
    for n in (1, 2, 3):
        ours, theirs = (report[side][f"distinct-{n}"] for side in ("model", "against"))
        table.add_row(f"distinct-{n}, share of word {n}-grams", f"{ours:.3f}", f"{theirs:.3f}", f"{ours - theirs:+.3f}")
    console = console or Console()
    console.print(table)
    rate = report["win_rate"]
    console.print(
        f"win rate {rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] over {rate['judged']} prompts, "
        f"{rate['ties']} ties counted half; judge: {report['judge'] or 'the sum of the rewards'}",
        markup=False,
        soft_wrap=True,
    )
    if report["judge_was_trained_on"]:
        console.print("note: the model was trained on the reward that judges here; name another with --judge")


def _number(value: dict[str, float | None], sign: str = "") -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:{sign}.3f}" + ("" if value["half_width"] is None else f" ± {value['half_width']:.3f}")


def evaluate_command(args: EvaluateArgs) -> None:
    """Run the `evaluate` command."""
    report = evaluate(args)
    with first_alone():
        print_evaluation(report)
        print(f"report   {args.output_dir}/evaluation.json")
        print(f"samples  {args.output_dir}/evaluation_samples.jsonl")
