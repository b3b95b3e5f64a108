"""Over-optimisation: a policy trained on a proxy reward improves, and then ruins, what the proxy stands for.

Run:  python benchmarks/overoptimization.py --picture docs/images/overoptimization.png  (three CPU minutes a seed)
The gold score is how positive a story sounds (VADER), less the share of its words that repeat earlier ones. A reward
model learns it from 256 comparisons of the start's own samples, which hardly repeat themselves. PPO then follows the
reward model with almost no KL penalty; gold is measured on the same responses and trains nothing. As in Gao et al.,
"Scaling Laws for Reward Model Overoptimization" (2022): the proxy rises throughout, gold rises and then falls with KL.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reproduction import Band, draw, reproduce

from rlhf_ppo import PPOTrainer, RewardModel, RLHFConfig
from rlhf_ppo.config.arguments.reward_training import RewardTrainingArgs
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.pipeline.demo import OPENINGS
from rlhf_ppo.pipeline.labelled.reward_training import train_reward_model
from rlhf_ppo.rewards.toy import positive_sentiment

PAIRS, EPISODES, WINDOW = 256, 4096, 4
RISE = Band("gold_rise", 0.05, 2.0)
FALL = Band("gold_fall", 0.05, 3.0)


def gold(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Score how positive a text sounds, less the share of its words that have occurred before."""
    scores = []
    for text, sentiment in zip(completions, positive_sentiment(prompts, completions), strict=True):
        words = re.findall(r"[a-z']+", text.lower())
        scores.append(sentiment - (1 - len(set(words)) / len(words) if words else 1.0))
    return scores


def prompts() -> list[str]:
    """Return the story openings of the package."""
    return [str(row["prompt"]) for row in load_rows(OPENINGS)]


@functools.cache
def proxy() -> str:
    """Train the reward model on comparisons of the start's samples, labelled by gold; returns its folder."""
    folder = tempfile.mkdtemp()
    texts = prompts()[:PAIRS]
    trainer = PPOTrainer(
        model="embedded",
        reward_funcs=gold,
        args=RLHFConfig(output_dir=f"{folder}/samples", num_generations=2, rollout_batch_size=2 * PAIRS, quiet=True),
        train_dataset=[{"prompt": text} for text in texts],
    )
    rollout = trainer.rollout(texts)
    rows = []
    for i, text in enumerate(texts):
        pair = sorted(
            zip(rollout.scores[2 * i : 2 * i + 2].tolist(), rollout.completions[2 * i : 2 * i + 2], strict=True)
        )
        rows.append({"prompt": text, "chosen": pair[1][1], "rejected": pair[0][1]})
    data = Path(folder) / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    measured = train_reward_model(
        RewardTrainingArgs(
            dataset=(str(data),), output_dir=f"{folder}/proxy", num_epochs=2, learning_rate=3e-4, quiet=True
        )
    )
    print("proxy:", {name: round(value, 3) for name, value in measured.items() if "accuracy" in name})
    return f"{folder}/proxy"


def run(seed: int, folder: str) -> dict[str, Any]:
    """Train on the proxy; return both scores against the KL, averaged over windows of rollouts."""
    trainer = PPOTrainer(
        model="embedded",
        reward_funcs=[RewardModel(proxy()), gold],
        args=RLHFConfig(
            output_dir=folder,
            seed=seed,
            total_episodes=EPISODES,
            reward_weights=(1.0, 0.0),
            kl_coef=0.001,
            num_epochs=2,
            lr_scheduler_type="constant",
            quiet=True,
        ),
        train_dataset=[{"prompt": text} for text in prompts()[PAIRS:]],
    )
    trainer.train()
    rows = [row for row in trainer.run.read() if "score/part/gold" in row]
    (name,) = [key for key in rows[0] if key.startswith("score/part/") and key != "score/part/gold"]
    columns = {"x": "kl/reference_nats_per_response", "proxy": name, "gold": "score/part/gold"}
    curve = [
        {key: sum(row[metric] for row in part) / len(part) for key, metric in columns.items()}
        for part in (rows[i : i + WINDOW] for i in range(0, len(rows), WINDOW))
    ]
    best = max(range(len(curve)), key=lambda i: curve[i]["gold"])
    return {
        "proxy_rise": curve[-1]["proxy"] - curve[0]["proxy"],
        "gold_rise": curve[best]["gold"] - curve[0]["gold"],
        "gold_fall": curve[best]["gold"] - curve[-1]["gold"],
        "kl_at_best_gold": curve[best]["x"],
        "kl_at_end": curve[-1]["x"],
        "curve": curve,
    }


def picture(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw both scores against the square root of the KL, the axis of Gao et al."""
    import matplotlib.pyplot as plt

    for row in rows:
        row["curve"] = [{**point, "root": max(point["x"], 0.0) ** 0.5} for point in row["curve"]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, name, color in zip(axes, ("proxy", "gold"), ("tab:orange", "tab:blue"), strict=True):
        draw(axis, rows, name, f"mean of {len(rows)} seeds", color, x="root")
        axis.set(xlabel="square root of the KL to the start, nats per response", title=f"{name} score")
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    reproduce(__doc__, "overoptimization", run, picture, RISE, FALL)


if __name__ == "__main__":
    main()
