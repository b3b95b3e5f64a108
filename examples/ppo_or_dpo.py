"""Compare PPO with DPO: the same preferences, the same initial model, and a known toy reward to measure both.

The small GPT-2 in the package samples pairs of stories, and the sentiment lexicon VADER, standing in for people,
chooses the better one. DPO trains on the pairs directly; PPO first trains a reward model on them.
What you will see: a table of true reward and KL to the start for both, on held-out prompts, and ppo_or_dpo.png with
reward over KL along both runs. It takes about four minutes on two CPU cores.
Run:  python examples/ppo_or_dpo.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.core import dpo_loss
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.pipeline.demo import OPENINGS
from rlhf_ppo.pipeline.labelled.reward_training import RewardTrainingArgs, train_reward_model
from rlhf_ppo.rewards.toy import positive_sentiment

BETA = 0.05  # weight of the KL in both objectives
HELD_OUT = 64
Curve = list[tuple[float, float]]
"""(KL to the start in nats per response, true reward) on the held-out prompts, along a run."""


def draw_pairs(
    trainer: PPOTrainer, prompts: list[str]
) -> tuple[list[tuple[Rollout, list[int], list[int]]], list[dict]]:
    """Sample two responses to each prompt: for DPO as tokens with the rows of better and worse, for PPO as text."""
    batches, texts = [], []
    for start in range(0, len(prompts), 16):
        rollout = trainer.rollout(prompts[start : start + 16] * 2)
        assert rollout.scores is not None
        half = len(rollout.prompts) // 2
        better, worse = [], []
        for i in range(half):
            first, second = rollout.scores[i], rollout.scores[i + half]
            if first != second:  # skip ties
                better.append(i if first > second else i + half)
                worse.append(i + half if first > second else i)
        for chosen, rejected in zip(better, worse, strict=True):
            names = {"chosen": chosen, "rejected": rejected}
            texts.append({"prompt": rollout.prompts[chosen], **{k: rollout.completions[i] for k, i in names.items()}})
        batches.append((rollout, better, worse))
    return batches, [row for row in texts if row["chosen"] and row["rejected"]]


def train_dpo(trainer: PPOTrainer, batches: list, *, epochs: int, learning_rate: float) -> Curve:
    """Run a plain DPO loop on the trainer's policy; the reference log-probs were computed when sampling the pairs."""
    policy = trainer.model
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=learning_rate, weight_decay=0.0)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    curve = [measure(trainer)]
    for step in range(steps):
        rollout, better, worse = batches[step % len(batches)]
        chosen, rejected = (policy(*rollout.sequences(rows), entropy=False).logprobs.sum(1) for rows in (better, worse))
        ref_chosen, ref_rejected = (rollout.ref_logprobs[rows].sum(1) for rows in (better, worse))
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=BETA).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.trainable_parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 6) == 0:
            curve.append(measure(trainer))
            print(f"dpo step {step + 1}/{steps}  loss {float(loss):.3f}  true reward {curve[-1][1]:.3f}", flush=True)
    return curve


def measure(trainer: PPOTrainer) -> tuple[float, float]:
    """Return KL and true reward on the held-out prompts; the trainer's own reward is the true one."""
    metrics = trainer.evaluate()
    return metrics["eval/kl_nats_per_response"], metrics["eval/score_mean"]


def ppo_curve(trainer: PPOTrainer) -> Curve:
    """Return the same from each evaluation's samples, rescored by the true reward (PPO used the reward model's)."""
    rows = trainer.run.read("eval_samples.jsonl")
    curve = []
    for iteration in sorted({row["iteration"] for row in rows}):
        part = [row for row in rows if row["iteration"] == iteration]
        truth = positive_sentiment([row["prompt"] for row in part], [row["completion"] for row in part])
        curve.append((sum(row["kl_nats"] for row in part) / len(part), sum(truth) / len(truth)))
    return curve


def draw(curves: dict[str, Curve], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=4, label=name)
    axes.set_xlabel("KL to the start, nats per response")
    axes.set_ylabel("true reward (VADER)")
    axes.set_title("The same preferences, held-out prompts")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)


def main(argv: list[str] | None = None) -> dict[str, Curve]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or hub id of a causal language model")
    parser.add_argument("--pairs", type=int, default=768, help="preferences to sample (ties are dropped)")
    parser.add_argument("--total-episodes", type=int, default=1536, help="responses that PPO trains on")
    parser.add_argument("--dpo-epochs", type=int, default=3, help="epochs of DPO over the pairs")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="prompts of the evaluation")
    parser.add_argument("--output-dir", default="runs/ppo-or-dpo", help="folder for everything")
    flags = parser.parse_args(argv)
    torch.set_num_threads(1)  # the model is too small for two threads
    folder = Path(flags.output_dir)
    openings = load_rows(OPENINGS)
    held_out, rest = openings.select(range(flags.held_out)), openings.select(range(flags.held_out, len(openings)))

    def trainer(name: str, reward: Any, **settings: Any) -> PPOTrainer:
        args = RLHFConfig(
            output_dir=str(folder / name),
            kl_coef=BETA,
            num_epochs=2,
            num_threads=1,
            precision="fp32",  # as in the DPO loop above, which has no autocast
            **settings,
        )
        return PPOTrainer(flags.model, reward, args, train_dataset=rest, eval_dataset=held_out)

    dpo = trainer("dpo", positive_sentiment)
    prompts = [rest[i % len(rest)]["prompt"] for i in range(flags.pairs)]
    batches, texts = draw_pairs(dpo, prompts)
    file = folder / "preferences.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    print(f"{len(texts)} preferences from {flags.pairs} prompts")

    curves = {"DPO": train_dpo(dpo, batches, epochs=flags.dpo_epochs, learning_rate=1e-4)}
    found = train_reward_model(
        RewardTrainingArgs(
            dataset=(str(file),), output_dir=str(folder / "reward"), model=flags.model, num_epochs=2, learning_rate=3e-4
        )
    )
    print(f"reward model: accuracy {found['accuracy']:.3f} on {found['eval_pairs']} held-out pairs")
    ppo = trainer("ppo", str(folder / "reward"), total_episodes=flags.total_episodes, eval_every=8)
    ppo.train()
    curves["PPO on a reward model"] = ppo_curve(ppo)
    draw(curves, folder / "ppo_or_dpo.png")

    print(f"\n{'':24}{'true reward':>12}{'KL, nats':>10}   on {flags.held_out} held-out prompts")
    print(f"{'start':24}{curves['DPO'][0][1]:12.3f}{curves['DPO'][0][0]:10.2f}")
    for name, curve in curves.items():
        print(f"{name:24}{curve[-1][1]:12.3f}{curve[-1][0]:10.2f}")
    print(f"picture  {folder / 'ppo_or_dpo.png'}")
    return curves


if __name__ == "__main__":
    main()
