"""Train SmolLM2-135M-Instruct (or another chat model) on arithmetic with a verifiable reward.

The reward parses the answer after #### and compares it with the solution; nothing a model writes is ever evaluated.
What you will see: progress, then the share of correct answers before and after on held-out problems, and samples.
  python examples/gsm8k.py --model FOLDER                  word problems of GSM8K, settings of gsm8k.yaml: for a GPU
  python examples/gsm8k.py --model FOLDER --short          sums of two numbers below 20, 5 to 15 minutes on a CPU
GSM8K (MIT licence) is read from --data FOLDER/datasets/gsm8k_train.jsonl.gz.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
from pathlib import Path

from rlhf_ppo.cli import main as rlhf_ppo

CONFIG = Path(__file__).with_name("gsm8k.yaml")
INSTRUCTION = "{question}\nThink briefly, then end with #### and the answer as a number."
SHORT = {
    "--total-episodes": "384",
    "--rollout-batch-size": "32",
    "--num-minibatches": "4",
    "--max-new-tokens": "10",
    "--eval-size": "64",
    "--kl-coef": "0.02",
    "--learning-rate": "1e-5",
    "--warmup-steps": "4",
}


def sums() -> list[dict[str, str]]:
    """Return sums of numbers below 20 and their answers, in a fixed shuffled order."""
    pairs = [(a, b) for a in range(1, 20) for b in range(1, 20)]
    random.Random(0).shuffle(pairs)
    return [{"question": f"What is {a} + {b}? Answer with the number alone.", "answer": str(a + b)} for a, b in pairs]


def read_problems(file: Path) -> list[dict[str, str]]:
    """Return GSM8K's problems, each prompted for the answer format that the reward expects."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [{**row, "question": INSTRUCTION.format(question=row["question"])} for row in rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a model with a chat template")
    parser.add_argument("--data", default=os.environ.get("RLHF_PPO_DATA", "../shared/data"), help="folder of the data")
    parser.add_argument("--output-dir", default="runs/gsm8k", help="folder of the run")
    parser.add_argument("--short", action="store_true", help="sums of two numbers and a short run, for a CPU")
    flags, more = parser.parse_known_args(argv)  # other flags go to rlhf-ppo train

    if flags.short:
        problems = sums()
    else:
        file = Path(flags.data) / "datasets" / "gsm8k_train.jsonl.gz"
        if not file.is_file():
            parser.error(f"{file} is not there: name its folder with --data or RLHF_PPO_DATA")
        problems = read_problems(file)
    short = SHORT if flags.short else {}
    settings = [word for flag, value in short.items() if flag not in more for word in (flag, value)]
    prompts = Path(flags.output_dir) / "problems.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    with prompts.open("w", encoding="utf-8") as out:
        for problem in problems:
            row = {"prompt": [{"role": "user", "content": problem["question"]}], "answer": problem["answer"]}
            out.write(json.dumps(row) + "\n")
    return rlhf_ppo(
        ["train", "--config", str(CONFIG), "--model", flags.model, "--dataset", str(prompts),
         "--output-dir", f"{flags.output_dir}/ppo", *settings, *more]
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
