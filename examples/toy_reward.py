"""Train a small GPT-2 on your own reward function: write without the letter e.

What you will see: a progress bar, then scores and KL before and after on held-out prompts, and samples side by side.
It takes about two minutes on two CPU cores with the model in the package. Another model: --model gpt2 (hub or folder).
Run:  python examples/toy_reward.py
"""

from __future__ import annotations

import argparse

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.pipeline.before_after import print_before_after
from rlhf_ppo.pipeline.demo import OPENINGS


def few_es(prompts, completions, **columns):
    """Return one score per completion; None would mean "cannot be scored"."""
    return [1 - 10 * text.lower().count("e") / len(text) if text else None for text in completions]


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or hub id of a causal language model")
    parser.add_argument("--total-episodes", type=int, default=1024, help="responses to train on")
    parser.add_argument("--learning-rate", type=float, default=None, help="default: chosen by the model's size")
    parser.add_argument("--output-dir", default="runs/few-es", help="folder of the run")
    flags = parser.parse_args(argv)

    openings = load_rows(OPENINGS)  # any data set with a column "prompt" works
    trainer = PPOTrainer(
        model=flags.model,
        reward_funcs=few_es,
        args=RLHFConfig(
            output_dir=flags.output_dir,
            total_episodes=flags.total_episodes,
            learning_rate=flags.learning_rate,
            num_threads=1 if flags.model == "embedded" else None,
        ),
        train_dataset=openings.select(range(64, len(openings))),
        eval_dataset=openings.select(range(64)),
    )
    metrics = trainer.train()
    print_before_after(trainer.run)
    return metrics


if __name__ == "__main__":
    main()
