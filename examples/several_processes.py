"""One script for a laptop, two GPUs or two machines: only the launch line changes, never the result.

What you will see: the small GPT-2 in the package, first taught story openings, then trained to write without the
letter e; at the end, printed once, how scores and texts have changed on held-out prompts. With any number of processes
you get the same numbers up to rounding. It takes about two minutes on two CPU cores.
Run:  python examples/several_processes.py
      torchrun --nproc-per-node 2 examples/several_processes.py
      accelerate launch --multi_gpu --num_processes 2 examples/several_processes.py
"""

from __future__ import annotations

import argparse

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.config.arguments.sft import SFTArgs
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.pipeline.before_after import print_before_after
from rlhf_ppo.pipeline.demo import OPENINGS
from rlhf_ppo.pipeline.labelled.sft import sft


def few_es(prompts, completions, **columns):
    """Score this process's share of the responses; see docs/scaling.md for rewards that compare all of them."""
    return [1 - 10 * text.lower().count("e") / len(text) if text else None for text in completions]


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-episodes", type=int, default=1024, help="responses to train on, by all processes")
    parser.add_argument("--output-dir", default="runs/several-processes", help="folder of both models")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    flags = parser.parse_args(argv)

    # Nothing here knows how many processes there are: batch sizes are those of all of them together.
    sft(
        SFTArgs(
            model="embedded",
            dataset=(str(OPENINGS),),
            text_column="prompt",
            output_dir=f"{flags.output_dir}/sft",
            quiet=flags.quiet,
        )
    )
    openings = load_rows(OPENINGS)
    trainer = PPOTrainer(
        model=f"{flags.output_dir}/sft",
        reward_funcs=few_es,
        args=RLHFConfig(
            output_dir=f"{flags.output_dir}/ppo", total_episodes=flags.total_episodes, num_threads=1, quiet=flags.quiet
        ),
        train_dataset=openings.select(range(64, len(openings))),
        eval_dataset=openings.select(range(64)),
    )
    metrics = trainer.train()
    print_before_after(trainer.run)
    if trainer.processes.first:  # what you print yourself, print once
        print(f"score {metrics['eval/score_mean']:.3f} with {trainer.processes.size} process(es)")
    return metrics


if __name__ == "__main__":
    main()
