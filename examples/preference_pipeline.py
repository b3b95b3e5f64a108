"""Tune a model on human judgements with five commands on real data: sft -> reward -> judge -> train -> evaluate.

--preferences sst2 (default): sentences of film reviews that people labelled positive or negative (SST-2); each
  comparison pairs a positive with a negative one. A small model can learn this: start here.
--preferences hh: answers to provoking questions, compared by people (Anthropic's HH, "harmless"; the texts are often
  offensive and are not printed). Far harder for a small model.
The data are split by prompt: for the reward model, for a judge that PPO never uses, and for the evaluation.
What you will see: each command with its output, ending with rewards, KL and the judge's win rate against the model
before PPO. It takes about six minutes on two CPU cores (sst2).
Run:  python examples/preference_pipeline.py --data FOLDER     (holds datasets/sst2_train.csv, ...)
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import shlex
from pathlib import Path
from typing import Any

from rlhf_ppo import RewardModel
from rlhf_ppo.cli import main as rlhf_ppo

Row = dict[str, str]
OPENING = 3
"""Words of a review that are given as the prompt."""


def read_sst2(folder: Path, draw: random.Random) -> list[Row]:
    """Pair positive with negative sentences, which share no prompt; ``opening`` is a prompt for PPO."""
    with (folder / "sst2_train.csv").open(encoding="utf-8", newline="") as file:
        sentences = [(row["label"], row["sentence"].strip()) for row in csv.DictReader(file)]
    good, bad = ([text for label, text in sentences if label == wanted and len(text.split()) > OPENING]
                 for wanted in "10")  # fmt: skip
    draw.shuffle(good)
    draw.shuffle(bad)
    pairs = zip(good, bad, strict=False)
    return [{"prompt": "", "chosen": a, "rejected": b, "opening": opening(b)} for a, b in pairs]


def opening(text: str) -> str:
    return " ".join(text.split()[:OPENING])


def read_hh(folder: Path, draw: random.Random) -> list[Row]:
    """Return a dialogue's two final answers with its last question; the rest is too long."""
    rows: list[Row] = []
    with gzip.open(folder / "hh_harmless_base_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            (before, chosen), (other, rejected) = (
                json.loads(line)[name].rsplit("\n\nAssistant:", 1) for name in ("chosen", "rejected")
            )
            chosen, rejected = chosen.strip(), rejected.strip()
            if before == other and chosen and rejected and chosen != rejected:
                question = before.rsplit("\n\nHuman:", 1)[-1].strip()
                prompt = f"Human: {question[-200:]}\n\nAssistant: "
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "opening": prompt})
    draw.shuffle(rows)
    return rows


READERS = {"sst2": read_sst2, "hh": read_hh}


def split(rows: list[Row]) -> dict[str, list[Row]]:
    """Split by prompt: half for the reward model, 3/10 for the judge, 2/10 for the evaluation."""
    prompts = list(dict.fromkeys(row["opening"] for row in rows))
    a, b = len(prompts) // 2, len(prompts) * 8 // 10
    part = {prompt: "reward" if i < a else "judge" if i < b else "evaluation" for i, prompt in enumerate(prompts)}
    parts = {name: [row for row in rows if part[row["opening"]] == name] for name in ("reward", "judge", "evaluation")}
    # A common opening ("This film is") may also begin a training text: leave it out.
    seen = {text for row in parts["reward"] + parts["judge"] for text in texts(row)}
    parts["evaluation"] = [row for row in parts["evaluation"] if not any(t.startswith(row["opening"]) for t in seen)]
    assert all(not text.startswith(row["opening"]) for row in parts["evaluation"] for text in seen)
    return parts


def texts(row: Row) -> tuple[str, str]:
    """Return the two texts that a reward model compares."""
    return row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]


def write(file: Path, rows: list[Row]) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def run(*words: object) -> None:
    """Print a command as you would type it, and run it."""
    print(f"\n$ rlhf-ppo {shlex.join(map(str, words))}", flush=True)
    if code := rlhf_ppo([str(word) for word in words]):
        raise SystemExit(code)


def accuracy(model: str, rows: list[Row]) -> float:
    """Return the share of comparisons on which a reward model agrees with people."""
    reward, prompts = RewardModel(model), [row["prompt"] for row in rows]
    chosen, rejected = (reward(prompts, [row[name] for row in rows]) for name in ("chosen", "rejected"))
    return sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preferences", choices=READERS, default="sst2", help="which preferences to learn")
    parser.add_argument("--data", default=os.environ.get("RLHF_PPO_DATA", "../shared/data"), help="folder of the data")
    parser.add_argument("--model", default="embedded", help="folder or hub id of a causal language model")
    parser.add_argument("--output-dir", default="runs/pipeline", help="folder for everything")
    parser.add_argument("--total-episodes", type=int, default=1024, help="responses that PPO trains on")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of the reward models; sft takes twice as many")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest response in tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of every command")
    flags = parser.parse_args(argv)
    source = Path(flags.data) / "datasets"
    if not source.is_dir():
        parser.error(f"{source} is not there: name the folder that holds it with --data or RLHF_PPO_DATA")

    parts = split(READERS[flags.preferences](source, random.Random(flags.seed)))
    folder = Path(flags.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: write(folder / f"{name}.jsonl", rows) for name, rows in parts.items()}
    training = parts["reward"] + parts["judge"]
    # SFT sees both answers of each pair; choosing the better one is left to the reward.
    answers = [{"prompt": row["prompt"], "answer": row[side]} for row in training for side in ("chosen", "rejected")]
    sft_rows = write(folder / "sft.jsonl", answers)
    prompts, held_out = (
        write(folder / f"{name}.jsonl", [{"prompt": text} for text in dict.fromkeys(row["opening"] for row in rows)])
        for name, rows in (("prompts", training), ("held-out-prompts", parts["evaluation"]))
    )
    start, reward, judge, policy = (str(folder / name) for name in ("sft", "reward-model", "judge", "ppo"))
    common = ["--seed", flags.seed]

    run("sft", "--model", flags.model, "--dataset", sft_rows, "--prompt-column", "prompt",
        "--completion-column", "answer", "--output-dir", start, "--max-length", 128, "--num-epochs", 2 * flags.epochs,
        "--learning-rate", "1e-3", "--warmup-steps", 20, *common)  # fmt: skip
    settings = ["--num-epochs", flags.epochs, "--learning-rate", "2e-4", "--max-length", 128, "--centering", "0.01"]
    run("reward", "--model", start, "--dataset", files["reward"], "--output-dir", reward, *settings, *common)
    run("reward", "--model", start, "--dataset", files["judge"], "--output-dir", judge, *settings, *common)
    run("train", "--model", start, "--reward", reward, "--dataset", prompts, "--output-dir", policy, "--eval-size", 0,
        "--total-episodes", flags.total_episodes, "--max-new-tokens", flags.max_new_tokens, "--num-epochs", 2,
        "--overlong-prompts", "truncate", "--num-threads", 1, *common)  # fmt: skip
    run("evaluate", "--model", policy, "--reward", reward, "--judge", judge, "--dataset", held_out,
        "--num-prompts", 256, "--output-dir", folder / "evaluation", *common)  # fmt: skip

    agreement = {name: accuracy(model, parts["evaluation"]) for name, model in (("reward", reward), ("judge", judge))}
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in parts["evaluation"]) / len(parts["evaluation"])
    print(f"\n{len(parts['evaluation'])} held-out comparisons decided as people did: reward model "
          f"{agreement['reward']:.3f}, judge {agreement['judge']:.3f}, the longer answer {longer:.3f}")  # fmt: skip
    report = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    return {**report, "agreement": agreement}


if __name__ == "__main__":
    main()
