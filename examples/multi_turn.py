"""Train a small GPT-2 to answer three questions in a text game, which is an environment of a few lines.

Tom is asked about his pet, then its colour, then its name. An answer without a fitting word ends the game, so points
for the last question need all three. What you will see: a progress bar, the points per game before and after, and two
games of each. It takes about two minutes on one CPU core with the model in the package.
Run:  python examples/multi_turn.py
"""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ppo import PPOTrainer, RLHFConfig

OPENING = 'Tom met {name}. "What pet do you have?" {name} asked. Tom said, "I have a'
NAMES = "Lily Ben Mia Sam Anna Max Sue Tim Amy Jack Lucy Bob".split()
QUESTIONS = [
    ("dog cat bird fish cow horse pig duck bear frog bunny lion mouse", '" "What colour is it?" Tom said, "It is'),
    ("red blue green yellow white black brown pink orange", '" "What is its name?" Tom said, "Its name is'),
    ("max spot tim sam ben lily lucy tom mia fluffy buddy daisy bella rex bob sue", ""),
]


class ThreeQuestions:
    """Give a point for each answer with a fitting word; the first answer without one ends the game."""

    def reset(self, row: dict[str, Any]) -> str:
        self.asked = 0
        return OPENING.format(name=row["name"])

    def step(self, messages: list[dict[str, Any]]) -> tuple[str, float, bool]:
        words, next_question = QUESTIONS[self.asked]
        self.asked += 1
        said = messages[-1]["content"].lower().replace(".", " ").replace(",", " ").split()
        right = bool(set(words.split()) & set(said))
        return next_question, float(right), not right or self.asked == len(QUESTIONS)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or hub id of a causal language model")
    parser.add_argument("--total-episodes", type=int, default=1280, help="games to train on")
    parser.add_argument("--turn-credit", choices=("token", "turn"), default="turn", help="what is one action for GAE")
    parser.add_argument("--output-dir", default="runs/three-questions", help="folder of the run")
    flags = parser.parse_args(argv)

    rows = [{"name": name} for name in NAMES]
    trainer = PPOTrainer(
        model=flags.model,
        environment=ThreeQuestions,
        args=RLHFConfig(
            output_dir=flags.output_dir,
            total_episodes=flags.total_episodes,
            max_turns=3,
            max_new_tokens=6,
            stop_strings=('"', "."),
            turn_credit=flags.turn_credit,
            precision="fp32",  # the same on every machine; bfloat16 gains little with a model this small
            num_threads=1 if flags.model == "embedded" else None,
        ),
        train_dataset=rows * 3,
        eval_dataset=rows * 8,
    )
    metrics = trainer.train()
    rows = trainer.run.read("eval_samples.jsonl")
    for title, wanted in (("before", 0), ("after", trainer.iteration)):
        played = [row for row in rows if row["iteration"] == wanted]
        print(f"\n{title}: {sum(row['score'] for row in played) / len(played):.2f} points a game of 3")
        for row in played[:2]:
            print(f"  ({row['score']:.0f} points) {row['prompt']}{row['completion']}")
    return metrics


if __name__ == "__main__":
    main()
