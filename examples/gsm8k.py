"""Verifiable rewards: SmolLM2-135M-Instruct (or another chat model) learns arithmetic that can be checked.

The reward parses the answer after #### and compares it with the right one; nothing a model writes is ever evaluated.
What you will see: progress, then the share of right answers before and after on held-out problems, and samples.
  python examples/gsm8k.py --model FOLDER                  word problems of GSM8K, settings of gsm8k.yaml: for a GPU
  python examples/gsm8k.py --model FOLDER --short          one-step sums made up here, for a CPU
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
SHORT = (
    "--total-episodes 256 --rollout-batch-size 16 --num-minibatches 2 --max-new-tokens 40 --eval-size 32 "
    "--kl-coef 0.02 --learning-rate 1e-5"
).split()


def one_step_problem(draw: random.Random) -> dict[str, str]:
    """A sum or difference of numbers below 20, as a word problem."""
    a, b = draw.randint(2, 19), draw.randint(2, 19)
    name, thing = draw.choice(["Tom", "Lily", "Sue", "Max"]), draw.choice(["apples", "books", "coins", "shells"])
    if draw.random() < 0.5:
        return {"question": f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
                "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}  # fmt: skip
    return {"question": f"{name} has {a + b} {thing} and gives away {b}. How many {thing} are left?",
            "answer": f"{a + b} - {b} = {a}\n#### {a}"}  # fmt: skip


def read_problems(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a model with a chat template")
    parser.add_argument("--data", default=os.environ.get("RLHF_PPO_DATA", "../shared/data"), help="folder of the data")
    parser.add_argument("--output-dir", default="runs/gsm8k", help="folder of the run")
    parser.add_argument("--short", action="store_true", help="one-step problems and a short run, for a CPU")
    flags, more = parser.parse_known_args(argv)  # whatever else is given goes to rlhf-ppo train

    if flags.short:
        draw = random.Random(0)
        problems = [one_step_problem(draw) for _ in range(512)]
    else:
        file = Path(flags.data) / "datasets" / "gsm8k_train.jsonl.gz"
        if not file.is_file():
            parser.error(f"{file} is not there: name its folder with --data or RLHF_PPO_DATA")
        problems = read_problems(file)
    prompts = Path(flags.output_dir) / "problems.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    with prompts.open("w", encoding="utf-8") as out:
        for problem in problems:
            content = INSTRUCTION.format(question=problem["question"])
            row = {"prompt": [{"role": "user", "content": content}], "answer": problem["answer"]}
            out.write(json.dumps(row) + "\n")
    return rlhf_ppo(
        ["train", "--config", str(CONFIG), "--model", flags.model, "--dataset", str(prompts),
         "--output-dir", f"{flags.output_dir}/ppo", *(SHORT if flags.short else []), *more]
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
