"""Make a small chat data set with the story model of the package: questions, and answers to imitate.

What you will see: four files in the folder, and one of their rows each. The story model writes every answer, so nothing
is downloaded and nobody's data are used.
  template.jinja   a chat template, because the story model has none
  chats.jsonl      questions with answers of two to three sentences, for `rlhf-ppo sft`
  questions.jsonl  the questions alone, for preferences and PPO
  held-out.jsonl   questions about other things, for the evaluation
How long: half a minute on a CPU core. docs/tutorials/chat-model.md goes on from here.
Run:  python examples/chat_data.py
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ppo.config.arguments.inference import GenerateArgs
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.pipeline.generate import generate

THINGS = (
    "cat dog bird bear fish frog duck rabbit mouse horse cow pig bee ant turtle lion monkey fox boy girl man lady king "
    "queen ball car train boat truck doll kite tree flower apple cake house park garden box hat"
).split()
KINDS = "little big happy sad funny old kind brave".split()
ASKS = ("Tell me a story about a {}.", "Write a short story about a {}.", "I want to hear about a {}.")
HELD_OUT = 8
"""Things that only the evaluation asks about."""

TEMPLATE = """\
{%- for message in messages -%}
{{- message.role + ':\\n' + message.content + (eos_token if message.role == 'assistant' else '') + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant:\\n' -}}{%- endif -%}
"""

Row = dict[str, Any]


def questions(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Return rows for training and rows about other things: a chat prompt, and how its answers begin."""
    things = draw.sample(THINGS, len(THINGS))
    parts: tuple[list[Row], list[Row]] = ([], [])
    for i, thing in enumerate(things):
        for kind in KINDS:
            what = f"{kind} {thing}"
            asked = draw.choice(ASKS).format(what).replace(" a old", " an old")
            start = f"Once upon a time, there was a {what}".replace(" a old", " an old")
            parts[i < HELD_OUT].append({"prompt": [{"role": "user", "content": asked}], "start": start})
    for part in parts:
        draw.shuffle(part)
    return parts


def sentences(text: str, most: int = 3) -> str | None:
    """Return the first sentences of a text, or None if it has fewer than two whole ones."""
    found = re.findall(r'[^.!?]+[.!?]"?', text)[:most]
    return "".join(found).strip() if len(found) > 1 else None


def write_answers(rows: Sequence[Row], samples: int, seed: int) -> list[Row]:
    """Let the story model continue each row's ``start``, and keep two to three sentences."""
    with tempfile.TemporaryDirectory() as folder:
        starts, answers = f"{folder}/starts.jsonl", f"{folder}/answers.jsonl"
        write(Path(starts), [{"prompt": row["start"], "chat": row["prompt"]} for row in rows])
        generate(
            GenerateArgs(
                model="embedded",
                dataset=starts,
                output=answers,
                num_samples=samples,
                batch_size=64,
                max_new_tokens=56,
                seed=seed,
            )
        )
        written = [(row, sentences(row["prompt"] + row["completion"])) for row in load_rows(answers)]
    return [{"prompt": row["chat"], "answer": text} for row, text in written if text]


def write(file: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="runs/chat", help="folder for the files")
    parser.add_argument("--samples", type=int, default=4, help="answers to each question")
    parser.add_argument("--questions", type=int, default=None, help="use only this many of each part (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the answers")
    flags = parser.parse_args(argv)

    folder = Path(flags.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = (part[: flags.questions] for part in questions(random.Random(flags.seed)))
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    files = {
        "chats.jsonl": write_answers(training, flags.samples, flags.seed),
        "questions.jsonl": [{"prompt": row["prompt"]} for row in training],
        "held-out.jsonl": [{"prompt": row["prompt"]} for row in held_out],
    }
    for name, rows in files.items():
        write(folder / name, rows)
        print(f"{folder / name}: {len(rows)} rows, such as {json.dumps(rows[0])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
