"""Generating text with a trained model, by the sampler it was trained with: for prompts, a data set, or in a chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from rlhf_ppo.core.validation import is_changed, require_types
from rlhf_ppo.data.chat import Prompt, with_chat_template
from rlhf_ppo.data.detokenization import TextPieces, before_each
from rlhf_ppo.data.mixtures import load_mixture
from rlhf_ppo.data.rows import prompt_rows
from rlhf_ppo.data.tokenization import encode_prompts, fit_prompt, require_vocabulary, tokenize_prompt
from rlhf_ppo.generation.decoding import sample_responses
from rlhf_ppo.generation.rollout import SamplingParams
from rlhf_ppo.generation.stop_strings import StopStringDetector, cut_at_stop_string
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward_checks import probe
from rlhf_ppo.models.loading import (
    load_config,
    load_policy,
    load_tokenizer,
    prompt_room,
    resolve_model,
    vocabulary_size,
)
from rlhf_ppo.runtime.device import resolve_device
from rlhf_ppo.runtime.processes import require_one_process, require_threads, torch_threads
from rlhf_ppo.runtime.progress import ProgressDisplay
from rlhf_ppo.runtime.run_directory import read_run
from rlhf_ppo.training.setup import stop_tokens, warn_of_unread_end


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Sample completions of prompts from a model, or chat with it."""

    model: str
    """Folder (an adapter's, too) or hub id, or "embedded"."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    dataset: str | None = None
    """Prompts from a hub id, a folder, or a csv, jsonl or parquet file (also .gz) instead."""
    split: str = "train"
    """Split of the data set."""
    prompt_column: str = "prompt"
    """Column with the prompts, text or chat messages."""
    output: str | None = None
    """With dataset: the jsonl file to write, one row a completion, the data set's other columns beside it."""
    chat_template: str | None = None
    """Jinja chat template for the tokenizer, a file or the text itself. None: the tokenizer's own."""
    chat: bool = False
    """Talk to the model: lines from the keyboard or a pipe, until end of input or /exit."""
    num_samples: int = 1
    """Completions per prompt."""
    batch_size: int = 32
    """Completions made at the same time."""
    max_new_tokens: int = 48
    """Longest completion in tokens."""
    stop_strings: tuple[str, ...] | None = None
    """Texts that end a completion and are left out of it; None: those of the run in the model's folder."""
    temperature: float = 1.0
    """Divides the logits; below 1 is safer, above 1 wilder."""
    seed: int = 0
    """Seed of the draws."""
    device: str | None = None
    """cuda, mps or cpu; None: the first of these that is there."""
    num_threads: int | None = None
    """CPU threads; None: 1 for models below ten million parameters, every usable CPU for others."""

    def __post_init__(self) -> None:
        require_types(self)
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        require_threads(self.num_threads)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        given = [name for name in ("prompt", "dataset", "chat") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of prompt, dataset and chat, got {' and '.join(given) or 'none'}")
        if (self.dataset is None) != (self.output is None):
            raise ValueError(f"dataset and output go together, got dataset={self.dataset!r} and output={self.output!r}")
        if self.chat and self.num_samples > 1:
            raise ValueError(f"chat has one reply a turn, got num_samples={self.num_samples}")
        for name, unread in (
            ("split", self.dataset is None),
            ("prompt_column", self.dataset is None),
            ("batch_size", self.chat),
        ):
            if unread and is_changed(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect on {given[0]}: leave it out")


@dataclass(frozen=True)
class Speaker:
    """A loaded model that answers prompts."""

    tokenizer: Any
    room: int | None
    """Most tokens a prompt may have beside max_new_tokens; None: the model sets no limit."""
    reply: Callable[[Sequence[Prompt]], list[str]]
    """[B] prompts -> [B] completions; an overlong prompt is an error."""


def load_speaker(args: GenerateArgs) -> Speaker:
    """The model of ``args`` with its sampler; its draws go on from call to call."""
    require_one_process()
    device = resolve_device(args.device)
    name = resolve_model(args.model)
    config, tokenizer = load_config(name), with_chat_template(load_tokenizer(name), args.chat_template)
    model = ActorCritic(load_policy(name), critic=False).to(device)
    probe(model)
    room = prompt_room(config, args.max_new_tokens)
    run = read_run(name)
    given = run.get("stop_token_ids")
    if given is None:
        stops = stop_tokens(name, config, tokenizer)
        warn_of_unread_end(stops, tokenizer)
    else:
        stops = tuple(given)
    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=min(run.get("min_new_tokens", 0), args.max_new_tokens),
        temperature=args.temperature,
        stop_token_ids=stops,
        stop_strings=tuple(run.get("stop_strings", ()) if args.stop_strings is None else args.stop_strings),
    )
    generator = torch.Generator(device).manual_seed(args.seed)

    def reply(prompts: Sequence[Prompt]) -> list[str]:
        prompt_ids, prompt_mask = encode_prompts(prompts, tokenizer, room=room, truncate=False, device=device)
        pieces = TextPieces(tokenizer)
        before = before_each(pieces, prompts, prompt_ids, prompt_mask)
        strings = params.stop_strings
        detector = StopStringDetector(pieces, strings, before) if strings else None
        with torch_threads(args.num_threads, model):
            sampled = sample_responses(
                model, prompt_ids, prompt_mask, params, generator=generator, stop_detector=detector
            )
        rows = zip(before, sampled.response_ids, sampled.mask, strict=True)
        return [cut_at_stop_string(pieces.decode(start, ids[keep].tolist()), strings) for start, ids, keep in rows]

    return Speaker(tokenizer, room, reply)


def generate(args: GenerateArgs) -> list[tuple[Prompt, str]]:
    """(prompt, completion) pairs, ``num_samples`` per prompt; those of a data set are also written to ``output``.

    Every prompt is checked, and ``output`` opened, before the model is loaded. Completions are written batch by batch,
    so that what was made is there if something fails later.

    Raises:
        ValueError: a bad model, data set or prompt (names the row), or ``output`` cannot be written.
    """
    require_one_process()
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in args.prompt]
    names = [f"prompt {i}" for i in range(len(rows))]
    if args.dataset is not None:
        data = prompt_rows(load_mixture(args.dataset, args.split), args.prompt_column)
        names, rows = list(data.names), data.to_list()
    require_prompts([row["prompt"] for row in rows], names, args.model, args.max_new_tokens, args.chat_template)
    rows = [row for row in rows for _ in range(args.num_samples)]
    pairs: list[tuple[Prompt, str]] = []
    if args.output is not None:
        _open(args.output, "a").close()
    speaker = load_speaker(args)
    # Without an output the completions themselves are printed.
    with ProgressDisplay("completions", len(rows), each="batch", quiet=args.output is None) as progress:
        progress.phase("generate")
        for start in range(0, len(rows), args.batch_size):
            batch = rows[start : start + args.batch_size]
            completions = speaker.reply([row["prompt"] for row in batch])
            pairs += zip([row["prompt"] for row in batch], completions, strict=True)
            if args.output is not None:
                written = [{**row, "completion": text} for row, text in zip(batch, completions, strict=True)]
                # An earlier run's completions stay until there are others to replace them.
                with _open(args.output, "a" if start else "w") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in written)
            progress.update(len(pairs))
    return pairs


def require_prompts(
    prompts: Sequence[Prompt], names: Sequence[str], model: str, max_new_tokens: int, chat_template: str | None
) -> None:
    """Raise a ValueError that names the first prompt that the model cannot read; its weights are not needed."""
    name = resolve_model(model)
    config, tokenizer = load_config(name), with_chat_template(load_tokenizer(name), chat_template)
    room = prompt_room(config, max_new_tokens)
    for prompt, where in zip(prompts, names, strict=True):
        ids = tokenize_prompt(prompt, tokenizer, where)
        require_vocabulary(ids, vocabulary_size(config), where)
        fit_prompt(ids, room, "error", where)


def _open(output: str, mode: Literal["a", "w"]) -> TextIO:
    file = Path(output)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open(mode, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output {output} cannot be written ({error.strerror}): name another file") from None


def chat(args: GenerateArgs, lines: Iterable[str] | None = None) -> None:
    """Answer line after line, keeping what was said, until the lines end or one is /exit.

    With a chat template lines are the user's messages; without one the model goes on writing one text, to which each
    line is added. What no longer fits the context is forgotten, oldest first.

    Args:
        args: model and sampler.
        lines: what the user says; None: standard input.
    """
    speaker = load_speaker(args)
    interactive = lines is None and sys.stdin.isatty()
    history: Prompt = [] if speaker.tokenizer.chat_template else ""
    if interactive:
        print("/exit or end of input ends the chat." + ("" if isinstance(history, list) else " No chat template: the "
              "model goes on with the text."))  # fmt: skip
    for line in _prompted(sys.stdin if lines is None else lines, interactive=interactive):
        text = line.rstrip("\r\n")
        if text.strip() == "/exit":
            break
        if not text.strip():
            continue
        history = history + text if isinstance(history, str) else [*history, {"role": "user", "content": text}]
        history = forget(history, speaker)
        (answer,) = speaker.reply([history])
        print(answer.strip() if isinstance(history, list) else answer, flush=True)
        reply = {"role": "assistant", "content": answer}
        history = history + answer if isinstance(history, str) else [*history, reply]


def _prompted(lines: Iterable[str], *, interactive: bool) -> Iterable[str]:
    """The lines, each asked for with a "> " if someone is there to see it."""
    source = iter(lines)
    while True:
        if interactive:
            print("> ", end="", flush=True)
        line = next(source, None)
        if line is None:
            return
        yield line


def forget(history: Prompt, speaker: Speaker) -> Prompt:
    """The history without what does not fit beside a reply: whole turns of a chat (never its last), or a text's start.

    Raises:
        ValueError: the last message alone is too long.
    """
    if speaker.room is None:
        return history
    ids = tokenize_prompt(history, speaker.tokenizer, "chat")
    if isinstance(history, str):
        kept = speaker.room
        while len(ids) > speaker.room:  # text cut between two tokens may have one more when it is read again
            history = TextPieces(speaker.tokenizer, special=True).text(ids[-kept:])
            ids, kept = tokenize_prompt(history, speaker.tokenizer, "chat"), kept - 1
        return history
    while len(ids) > speaker.room and len(history) > 2:
        history = history[2:]
        ids = tokenize_prompt(history, speaker.tokenizer, "chat")
    return history
