"""Evaluation: a trained model against its reference on held-out prompts, every figure with its uncertainty."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_ppo.config.inference import EvaluateArgs
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.chat import Completion
from rlhf_ppo.data.mixtures import load_mixture
from rlhf_ppo.data.rows import Rows, prompt_rows
from rlhf_ppo.data.tokenization import require_room
from rlhf_ppo.generation.multi_turn import Respond
from rlhf_ppo.models.loading import (
    BASE_FOLDER,
    REFERENCE_FOLDER,
    adapter_base,
    load_config,
    load_tokenizer,
    prompt_room,
    resolve_model,
    vocabulary_size,
)
from rlhf_ppo.pipeline.comparison import differences, distinct, interval, win_rate
from rlhf_ppo.pipeline.generate import require_prompts
from rlhf_ppo.runtime.processes import require_one_process, torch_threads
from rlhf_ppo.runtime.progress import ProgressDisplay
from rlhf_ppo.runtime.run_directory import RunDirectory, read_run
from rlhf_ppo.runtime.user_code import load_function
from rlhf_ppo.training.collect import collect
from rlhf_ppo.training.reporting import describe
from rlhf_ppo.training.setup import set_up

_SAMPLER = (
    *("max_new_tokens", "temperature", "stop_token_ids", "stop_strings", "min_new_tokens"),
    *("max_turns", "respond_timeout_s"),
)
"""Settings of a run that say how it sampled; an evaluation takes them over."""

_READING = ("reward_chat_template", "reward_max_length")
"""Settings of a run that say how its reward models read text."""


def evaluate(args: EvaluateArgs) -> dict[str, Any]:
    """Sample both models on the same prompts, measure, and write evaluation.json and evaluation_samples.jsonl.

    Returns:
        What evaluation.json holds: ``model``, ``against`` and ``difference`` (paired by prompt) with {mean, half_width}
        of each measure, ``win_rate`` with its interval (see :mod:`rlhf_ppo.pipeline.comparison`).
    Raises:
        ValueError: bad settings, data or models, no reference to be found, or a judge that scores nothing.
        RewardError: a reward function failed.
    """
    require_one_process()
    load_config(resolve_model(args.model))  # that it is there comes before what it says of itself
    settings = read_run(args.model)
    reference = args.ref_model or _reference(args.model, settings)
    against = args.against or reference
    _require_one_vocabulary(model=args.model, reference=reference, against=against)
    mixture = load_mixture(args.dataset, args.split, weights=args.dataset_weights, seed=args.seed)
    rows = prompt_rows(mixture, args.prompt_column)
    if args.num_prompts is not None:
        rows = rows.select(range(min(args.num_prompts, len(rows))))
    config = _sampler_config(args, settings)
    respond = _respond(args, settings, config.max_turns)
    # What the second model cannot read is said before the first one has sampled every prompt.
    require_room(prompt_room(load_config(resolve_model(against)), config.max_new_tokens), config.max_new_tokens)
    require_prompts(rows["prompt"], rows.names, against, config.max_new_tokens, config.chat_template)
    run = RunDirectory(args.output_dir)
    samples = [_sample(name, reference, args, config, rows, respond) for name in (args.model, against)]
    measures = [_measures(part) for part in samples]
    verdicts = [[row["verdict"] for row in part] for part in samples]
    report = {
        "prompts": len(rows),
        "reference": reference,
        "judge": args.judge,
        "judge_was_trained_on": _trained_on(args, settings),
        "interval": "95 %: 1.96 standard errors over prompts; win rate: Wilson's",
        "model": _summary(args.model, samples[0], measures[0]),
        "against": _summary(against, samples[1], measures[1]),
        "difference": {name: interval(differences(measures[0][name], measures[1][name])) for name in measures[0]},
        "win_rate": win_rate(*verdicts),
    }
    file = run.path / "evaluation_samples.jsonl"
    file.unlink(missing_ok=True)
    for ours, theirs in zip(*samples, strict=True):
        prompt = ours.pop("prompt")
        theirs.pop("prompt")
        run.append(file.name, {"prompt": prompt, "model": ours, "against": theirs})
    run.write_json("evaluation.json", report)
    return report


def _require_one_vocabulary(**models: str) -> None:
    """Each is compared with the reference token by token; said before one of them has sampled every prompt."""
    sizes = {name: vocabulary_size(load_config(resolve_model(model))) for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} ({models[name]}) {size}" for name, size in sizes.items())
        raise ValueError(f"vocabularies differ, in tokens: {found}; use models of one tokenizer")


def _reference(model: str, settings: dict[str, Any]) -> str:
    found = settings.get("reference") or settings.get("ref_model") or settings.get("model") or adapter_base(model)
    if found in (BASE_FOLDER, REFERENCE_FOLDER):
        found = str(beside) if (beside := Path(model) / found).is_dir() else None
    if not found:
        raise ValueError(
            f"{model} does not say what it was trained from (no run.json with a model in it, or a model object that "
            f"lies neither in {BASE_FOLDER}/ nor in {REFERENCE_FOLDER}/): name the reference for the KL with ref_model"
        )
    return str(found)


def _trained_on(args: EvaluateArgs, settings: dict[str, Any]) -> bool:
    """Whether a reward that judges here was one of the run's; of a model that does not say, the rewards may be."""
    if args.judge is None and "reward" not in settings:
        return True
    judges = args.reward if args.judge is None else (args.judge,)
    return any(_same_reward(judge, trained) for judge in judges for trained in settings.get("reward", ()))


def _same_reward(judge: str, trained: str) -> bool:
    """Whether two names may be of one reward: a function's file or module can be named in several ways."""
    if ":" in judge and ":" in trained and not judge.startswith("http"):
        return judge.rpartition(":")[2] == trained.rpartition(":")[2]
    return judge == trained or (Path(judge).exists() and Path(judge).resolve() == Path(trained).resolve())


def _scoring(args: EvaluateArgs, settings: dict[str, Any]) -> dict[str, Any]:
    """How the run's own rewards were read and weighted, where they are asked again."""
    again = [name for name in args.reward if name in settings.get("reward", ()) and ":" not in name]
    chosen = {name: settings[name] for name in _READING if again and settings.get(name) is not None}
    chosen |= {name: value for name in _READING if (value := getattr(args, name)) is not None}
    same = list(args.reward) == list(settings.get("reward", ()))
    weights = settings.get("reward_weights") if same else None
    if args.judge is not None:
        # The judge is asked like a reward, and counts for nothing in their sum.
        weights = (*(weights or [1.0] * len(args.reward)), 0.0)
    return {**chosen, "reward_weights": None if weights is None else tuple(weights)}


def _sampler_config(args: EvaluateArgs, settings: dict[str, Any]) -> RLHFConfig:
    fields = {field.name for field in dataclasses.fields(RLHFConfig)}
    chosen: dict[str, Any] = {name: settings[name] for name in _SAMPLER if name in settings and name in fields}
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    for name in ("max_new_tokens", "temperature", "max_turns"):
        if (value := getattr(args, name)) is not None:
            chosen[name] = value
    if chosen.get("max_turns", 1) == 1:
        chosen.pop("respond_timeout_s", None)
    template = args.chat_template
    if template is None and settings.get("chat_template") is not None:
        template = str(load_tokenizer(args.model).chat_template)  # saved there; the file may have gone
    return RLHFConfig(
        **chosen,
        chat_template=template,
        **_scoring(args, settings),
        output_dir=args.output_dir,
        drop_nonfinite_scores=args.drop_nonfinite_scores,
        objective="reinforce",  # no critic is read
        recompute_logprobs=True,  # by the passes that read the reference: of a model to itself the KL is 0 in bf16, too
        rollout_batch_size=args.batch_size,
        num_minibatches=1,
        seed=args.seed,
        device=args.device,
        precision=args.precision,
    )


def _respond(args: EvaluateArgs, settings: dict[str, Any], max_turns: int) -> Respond | None:
    name = args.respond or (settings.get("respond") if max_turns > 1 else None)
    if name is None and max_turns > 1:
        raise ValueError(
            f"max_turns={max_turns} needs respond, which answers the model's turns, and {args.model} does not name it "
            "(it was trained from Python, or is no run): name it with respond, or set max_turns to 1"
        )
    return None if name is None else load_function(name, "respond")


def _sample(
    model: str,
    reference: str,
    args: EvaluateArgs,
    config: RLHFConfig,
    rows: Rows,
    respond: Respond | None,
) -> list[dict[str, Any]]:
    """One row per prompt: that of ``describe``, each reward's own score, and the judge's verdict."""
    setup, actor_critic = set_up(
        model,
        [*args.reward, *([] if args.judge is None else [args.judge])],
        config,
        train_dataset=None,
        eval_dataset=rows,
        processing_class=None,
        ref_model=reference,
        value_model=None,
        peft_config=None,
        respond=respond,
    )
    assert setup.eval_prompts is not None
    generator = torch.Generator(setup.device).manual_seed(args.seed)
    found: list[dict[str, Any]] = []
    with (
        torch_threads(args.num_threads, actor_critic),
        ProgressDisplay(f"prompts of {Path(model).name}", len(rows), each="batch", quiet=args.quiet) as progress,
        setup.stopwatch.shown_by(progress.phase),
    ):
        for start in range(0, len(rows), args.batch_size):
            batch = setup.eval_prompts.take(range(start, min(start + args.batch_size, len(rows))))
            rollout = collect(setup, actor_critic, batch, generator, needs_scores=False)
            for i, row in enumerate(describe(rollout)):
                scores = {name: part[i] for name, part in rollout.score_parts.items()}
                verdict = row["score"] if args.judge is None else list(scores.values())[-1]
                found.append({**row, "rewards": scores, "verdict": verdict})
            progress.update(len(found))
    return found


def _measures(part: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Measure -> one value per prompt."""
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
    """A completion as text; of a chat's messages the model's own."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion if message["role"] == "assistant")


def print_evaluation(report: dict[str, Any], *, console: Console | None = None) -> None:
    """Print the report as a table, and who judged."""
    table = Table(title=f"{report['prompts']} prompts, 95 % intervals", title_justify="left")
    table.add_column("")
    for side in ("model", "against"):
        table.add_column(Text(report[side]["name"]), justify="right")  # as it is: a folder t[/y] is no markup
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
        console.print("note: the model was trained on what judges here; --judge names one that it never saw")


def _number(value: dict[str, float | None], sign: str = "") -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:{sign}.3f}" + ("" if value["half_width"] is None else f" ± {value['half_width']:.3f}")


def evaluate_command(args: EvaluateArgs) -> None:
    """Run the `evaluate` command."""
    print_evaluation(evaluate(args))
    print(f"figures  {args.output_dir}/evaluation.json")
    print(f"samples  {args.output_dir}/evaluation_samples.jsonl")
