"""Which learning rate suits a model of 2, 15 or 135 million parameters, trained whole or through an adapter?

Run:  python benchmarks/learning_rates.py 2m --rates 3e-5 1e-4 3e-4 1e-3 --seeds 2
      python benchmarks/learning_rates.py 135m-lora --rates 3e-5 1e-4 3e-4 --episodes 192
Judge a rate by score - kl_coef x KL, what a run maximises, on 96 held-out prompts; the critic's rate is chosen unless
--set names it. 15m and 135m are folders models/stories15M-hf-fp16 and models/SmolLM2-135M-Instruct in RLHF_PPO_DATA.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

from critic_tasks import TASKS, TOY, Task, read_setting, run_once

SMOLLM2 = "models/SmolLM2-135M-Instruct"
SHORT = {"num_epochs": 2, "max_new_tokens": 16}
TASKS |= {
    "smollm2": Task("positive words (VADER), Llama of 135 M", TOY + "positive_sentiment", 0.05, SMOLLM2, SHORT),
    "smollm2-lora": Task("the same, LoRA", TOY + "positive_sentiment", 0.05, SMOLLM2, SHORT, TASKS["lora"].peft),
}
MODELS = {
    "2m": "sentiment",
    "2m-lora": "lora",
    "15m": "stories15m",
    "135m": "smollm2",
    "135m-lora": "smollm2-lora",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=768)
    parser.add_argument("--set", type=read_setting, action="append", default=[], metavar="NAME=VALUE")
    flags = parser.parse_args()
    settings = {"kl_coef": 0.05, "num_threads": 1, **dict(flags.set)}
    print("| learning rate | score - kl_coef x KL | score: before | after | KL (nats/response) | ", end="")
    print("explained variance | CPU s |\n" + "|---" * 7 + "|", flush=True)
    for rate in flags.rates:
        rows = []
        for seed in range(flags.seeds):
            with tempfile.TemporaryDirectory() as folder:
                run = {**settings, "learning_rate": rate}
                rows.append(run_once(MODELS[flags.model], seed, flags.episodes, folder, **run))
        mean = {
            name: statistics.fmean(row[name] for row in rows)
            for name in ("score_before", "score", "kl", "explained_variance", "cpu_seconds")
        }
        goals = [row["score"] - settings["kl_coef"] * row["kl"] for row in rows]
        each = f" ({' / '.join(f'{goal:.3f}' for goal in goals)})" if len(goals) > 1 else ""
        print(
            f"| {rate:g} | {statistics.fmean(goals):.3f}{each} | {mean['score_before']:.3f} | {mean['score']:.3f} "
            f"| {mean['kl']:.2f} | {mean['explained_variance']:.2f} | {mean['cpu_seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
