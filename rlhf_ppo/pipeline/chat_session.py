"""Chat with a model on the command line; what no longer fits into its context is dropped."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial

from rlhf_ppo.config.arguments.inference import GenerateArgs
from rlhf_ppo.data.chat import Prompt
from rlhf_ppo.data.detokenization import TextPieces
from rlhf_ppo.data.tokenization import tokenize_prompt
from rlhf_ppo.pipeline.explain import explain_completions
from rlhf_ppo.pipeline.generate import TextGenerator, generate, load_generator
from rlhf_ppo.runtime.processes.launch import require_one_process
from rlhf_ppo.runtime.processes.voice import first_alone


def chat(args: GenerateArgs, lines: Iterable[str] | None = None) -> None:
    """Answer each line, with the conversation so far as context, until the lines end or one is /exit.

    With a chat template, lines are user messages; without one, each line is appended to one text that the model
    continues. What no longer fits into the context is dropped, oldest first.

    Args:
        args: model and sampler.
        lines: the user's lines; None: standard input.
    Raises:
        ValueError: a launcher started several processes.
    """
    require_one_process("chat", "it answers one line at a time")
    generator = load_generator(args)
    interactive = lines is None and sys.stdin.isatty()
    history: Prompt = [] if generator.tokenizer.chat_template else ""
    if interactive:
        print("/exit or end of input ends the chat."
              + ("" if isinstance(history, list) else " No chat template: the model continues the text."))  # fmt: skip
    for line in _prompted(sys.stdin if lines is None else lines, interactive=interactive):
        text = line.rstrip("\r\n")
        if text.strip() == "/exit":
            break
        if not text.strip():
            continue
        history = history + text if isinstance(history, str) else [*history, {"role": "user", "content": text}]
        history = drop_oldest(history, generator)
        (answer,) = generator.complete([history], [generator.template.of_row({}, "chat")])
        print(answer.strip() if isinstance(history, list) else answer, flush=True)
        reply = {"role": "assistant", "content": answer}
        history = history + answer if isinstance(history, str) else [*history, reply]


def _prompted(lines: Iterable[str], *, interactive: bool) -> Iterable[str]:
    """Yield the lines; print "> " before each if a person types them."""
    source = iter(lines)
    while True:
        if interactive:
            print("> ", end="", flush=True)
        line = next(source, None)
        if line is None:
            return
        yield line


def drop_oldest(history: Prompt, generator: TextGenerator) -> Prompt:
    """Drop what leaves no room for a reply: a chat's oldest turns (never the last message), or a text's beginning.

    The last message may still be too long; then sampling raises an error.
    """
    if generator.room is None:
        return history
    read = partial(tokenize_prompt, tokenizer=generator.tokenizer, where="chat", template=generator.template.kwargs)
    ids = read(history)
    if isinstance(history, str):
        kept = generator.room
        while len(ids) > generator.room:  # text cut between two tokens may have one more when it is encoded again
            history = TextPieces(generator.tokenizer, special=True).text(ids[-kept:])
            ids, kept = read(history), kept - 1
        return history
    while len(ids) > generator.room and len(history) > 2:
        history = history[2:]
        ids = read(history)
    return history


def generate_or_chat(args: GenerateArgs) -> None:
    """Run the `generate` command."""
    if args.chat:
        chat(args)
        return
    if args.explain:
        explain_completions(args)
        return
    pairs = generate(args)
    with first_alone():
        if args.output is not None:
            print(f"{len(pairs)} completions  {args.output}")
            return
        for prompt, completion in pairs:
            print(f"{prompt}|{completion}\n")
