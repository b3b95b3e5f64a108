"""Generate completions of prompts or of a data set, sampling as the model was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from rlhf_ppo.config.arguments.inference import GenerateArgs
from rlhf_ppo.data.chat import Prompt, TemplateOptions, with_chat_template
from rlhf_ppo.data.detokenization import TextPieces, before_each
from rlhf_ppo.data.mixtures import load_mixture
from rlhf_ppo.data.rows import prompt_rows
from rlhf_ppo.data.template_options import TemplateDefaults, require_read
from rlhf_ppo.data.tokenization import encode_prompts, fit_prompt, require_vocabulary, tokenize_prompt
from rlhf_ppo.generation.decoding import sample_responses
from rlhf_ppo.generation.rollout import SamplingParams
from rlhf_ppo.generation.sampling import RowsOf, uniforms
from rlhf_ppo.generation.stop_strings import StopStringDetector, response_texts
from rlhf_ppo.generation.stop_tokens import stop_tokens, warn_of_unread_end
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.forward_checks import check_forward
from rlhf_ppo.models.loading import (
    load_config,
    load_policy,
    load_tokenizer,
    prompt_room,
    resolve_model,
    vocabulary_size,
)
from rlhf_ppo.runtime.files import json_line
from rlhf_ppo.runtime.logs.progress import ProgressDisplay
from rlhf_ppo.runtime.logs.run_directory import read_run
from rlhf_ppo.runtime.machine.device import resolve_device
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.runtime.processes.join import join_for, join_processes
from rlhf_ppo.runtime.processes.launch import own_gpu
from rlhf_ppo.training.checkpoints.fingerprints import require_same_data


@dataclass(frozen=True)
class TextGenerator:
    """A loaded model that completes prompts."""

    tokenizer: Any
    room: int | None
    """Maximum prompt length in tokens beside max_new_tokens; None: the model sets no limit."""
    complete: Callable[[Sequence[Prompt], Sequence[TemplateOptions]], list[str]]
    """[B] prompts, and what each chat is rendered with besides messages -> [B] completions, which several processes
    share; an overlong prompt is an error."""
    template: TemplateDefaults = field(default_factory=TemplateDefaults)
    """What chats are rendered with besides messages."""


def load_generator(args: GenerateArgs) -> TextGenerator:
    """Load the model with its sampler, whose random numbers continue from call to call."""
    processes, device = join_processes(), own_gpu(resolve_device(args.device))
    name = resolve_model(args.model)
    config, tokenizer = load_config(name), with_chat_template(load_tokenizer(name), args.chat_template)
    model = ActorCritic(load_policy(name), critic=False).to(device)
    check_forward(model)
    room = prompt_room(config, args.max_new_tokens)
    run = read_run(name)
    if (given := run.get("stop_token_ids")) is not None:
        stops = tuple(given)
    else:
        stops = stop_tokens(name, config, tokenizer)
        warn_of_unread_end(stops, tokenizer)
    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=min(run.get("min_new_tokens", 0), args.max_new_tokens),
        temperature=args.temperature,
        stop_token_ids=stops,
        stop_strings=tuple(run.get("stop_strings", ()) if args.stop_strings is None else args.stop_strings),
    )
    generator = torch.Generator(device).manual_seed(args.seed)

    def complete_own(prompts: Sequence[Prompt], templates: Sequence[TemplateOptions], whole: RowsOf) -> list[str]:
        if not prompts:
            uniforms(params.max_new_tokens, 0, generator, device, whole)  # used up on every process alike
            return []
        ids, mask = encode_prompts(prompts, tokenizer, room=room, truncate=False, device=device, templates=templates)
        pieces = TextPieces(tokenizer)
        before = before_each(pieces, prompts, ids, mask)
        detector = StopStringDetector(pieces, params.stop_strings, before) if params.stop_strings else None
        with torch_threads(args.num_threads, model):
            sampled = sample_responses(
                model, ids, mask, params, generator=generator, stop_detector=detector, whole=whole
            )
        return response_texts(sampled, pieces, before, params.stop_strings)

    def complete(prompts: Sequence[Prompt], templates: Sequence[TemplateOptions]) -> list[str]:
        own = processes.block(len(prompts))
        whole = RowsOf(own, len(prompts))
        here = slice(own.start, own.stop)
        parts = processes.facts(lambda: complete_own(prompts[here], templates[here], whole))
        return [text for part in parts for text in part]

    return TextGenerator(tokenizer, room, complete, _template(args, run))


def _template(args: GenerateArgs, run: dict[str, Any]) -> TemplateDefaults:
    given = args.chat_template_kwargs
    return TemplateDefaults(run.get("chat_template_kwargs") if given is None else given)


def generate(args: GenerateArgs) -> list[tuple[Prompt, str]]:
    """Return (prompt, completion) pairs, ``num_samples`` per prompt; write those of a data set to ``output``, too.

    Every prompt is checked, and ``output`` opened, before the model is loaded. Completions are written batch by batch,
    in the order of the prompts, so that a later failure does not lose them.

    Raises:
        ValueError: a bad model, data set or prompt (names the row), or ``output`` cannot be written.
    """
    processes = join_for(args)
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in args.prompt]
    names = [f"prompt {i}" for i in range(len(rows))]
    if args.dataset is not None:
        data = prompt_rows(load_mixture(args.dataset, args.split), args.prompt_column)
        require_same_data(processes, {"dataset": data})
        names, rows = list(data.names), data.to_list()
    template = _template(args, read_run(resolve_model(args.model)))
    templates = [template.of_row(row, where) for row, where in zip(rows, names, strict=True)]
    prompts = [row["prompt"] for row in rows]
    require_prompts(prompts, names, templates, args.model, args.max_new_tokens, args.chat_template)
    rows = [row for row in rows for _ in range(args.num_samples)]
    templates = [options for options in templates for _ in range(args.num_samples)]
    pairs: list[tuple[Prompt, str]] = []
    output = args.output
    if output is not None:
        processes.on_first(lambda: _open(output, "a").close())
    generator = load_generator(args)
    # Without an output the completions themselves are printed.
    quiet = output is None or not processes.first
    with ProgressDisplay("completions", len(rows), each="batch", quiet=quiet) as progress:
        progress.phase("generate")
        for start in range(0, len(rows), args.batch_size):
            batch = rows[start : start + args.batch_size]
            own = templates[start : start + args.batch_size]
            completions = generator.complete([row["prompt"] for row in batch], own)
            pairs += zip([row["prompt"] for row in batch], completions, strict=True)
            if output is not None:
                written = [{**row, "completion": text} for row, text in zip(batch, completions, strict=True)]
                # An earlier run's completions are kept until there are new ones to replace them.
                processes.on_first(partial(_write, output, "a" if start else "w", written))
            progress.update(len(pairs))
    return pairs


def require_prompts(
    prompts: Sequence[Prompt],
    names: Sequence[str],
    templates: Sequence[TemplateOptions],
    model: str,
    max_new_tokens: int,
    chat_template: str | None,
) -> None:
    """Raise a ValueError that names the first prompt that the model cannot read, without loading its weights."""
    name = resolve_model(model)
    config, tokenizer = load_config(name), with_chat_template(load_tokenizer(name), chat_template)
    room = prompt_room(config, max_new_tokens)
    for prompt, where, template in zip(prompts, names, templates, strict=True):
        require_read(tokenizer, prompt, template, where)
        ids = tokenize_prompt(prompt, tokenizer, where, template)
        require_vocabulary(ids, vocabulary_size(config), where)
        fit_prompt(ids, room, "error", where)


def _write(output: str, mode: Literal["a", "w"], rows: Sequence[dict[str, Any]]) -> None:
    with _open(output, mode) as file:
        file.writelines(map(json_line, rows))


def _open(output: str, mode: Literal["a", "w"]) -> TextIO:
    file = Path(output)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open(mode, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output {output} cannot be written ({error.strerror}): name another file") from None
