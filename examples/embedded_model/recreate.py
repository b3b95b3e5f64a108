"""Recreate the packaged small GPT-2 and the story openings that the demo uses as prompts.

What you will see: a progress bar over four epochs (about an hour on two CPU cores), then the held-out perplexity.
Run:  python examples/embedded_model/recreate.py --dataset stories.jsonl.gz --output-dir runs/embedded
The data set is one {"text": ...} a line; any collection of short, simple stories works.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rlhf_ppo.data.files import load_rows
from rlhf_ppo.pipeline.labelled.sft import SFTArgs, hold_out, sft

WORDS = 16


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="stories: a jsonl file with a column text")
    parser.add_argument("--output-dir", required=True, help="folder for model, tokenizer and story-openings.jsonl")
    parser.add_argument("--num-epochs", type=float, default=4, help="passes over the stories")
    flags = parser.parse_args(argv)
    args = SFTArgs(
        dataset=flags.dataset,
        output_dir=flags.output_dir,
        architecture=str(Path(__file__).parent / "config.json"),
        max_length=320,
        num_epochs=flags.num_epochs,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=200,
        weight_decay=0.1,
        save_dtype="float16",
    )
    metrics = sft(args)
    # Openings come from the held-out stories, so that the model never saw how they go on.
    held_out = hold_out(load_rows(flags.dataset), args)["test"]["text"]
    openings = dict.fromkeys(" ".join(text.split()[:WORDS]) for text in held_out)
    with (Path(args.output_dir) / "story-openings.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": opening}) + "\n" for opening in openings)
    print(metrics)
    return metrics


if __name__ == "__main__":
    main()
