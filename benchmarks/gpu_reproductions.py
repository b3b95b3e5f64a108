"""Reproductions of published results that need a GPU and the hub: run through at tiny size, not yet measured.

Run:  python benchmarks/gpu_reproductions.py gsm8k | tldr | imdb [--seed 1]      (hours on one GPU)
      python benchmarks/gpu_reproductions.py gsm8k --tiny      (the same code with the embedded model on a CPU; seconds)
gsm8k  Qwen2.5-0.5B-Instruct with a verifiable reward. Published by verl: 49.6 % of the test problems, then 56.7 %
tldr   Pythia-1B summarises posts (TL;DR). Published by TRL: 33.0 % of its summaries win against people's, then 64.7 %;
       a large model judges there, the reward model here, so that only the direction is comparable
imdb   GPT-2 continues film reviews. Published by TRL: mean logit of "positive" -0.51 before, 1.68 after, 6 nats of KL
Prints what was measured before and after, and the published figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import load_dataset

from rlhf_ppo import PPOTrainer, RewardModel, RLHFConfig
from rlhf_ppo.rewards.gsm8k import gsm8k

Rows = list[dict[str, Any]]
INSTRUCTION = "{question}\nLet's think step by step and output the final answer after ####."
TINY = {
    "total_episodes": 16,
    "rollout_batch_size": 8,
    "num_minibatches": 2,
    "max_new_tokens": 8,
    "device": "cpu",
    "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
}


@dataclass(frozen=True)
class Recipe:
    """A published run: where it starts, what it is paid for, and what came out."""

    model: str
    published: str
    rows: Callable[[str], Rows]
    """Prompts of a split, "train" or "test", with the columns that the reward reads."""
    reward: Callable[[], Any]
    settings: dict[str, Any]
    held_out: int
    tiny_rows: Rows = field(default_factory=list)


def gsm8k_rows(split: str) -> Rows:
    """Return GSM8K's problems as chats."""
    rows = load_dataset("openai/gsm8k", "main", split=split)
    return [
        {"prompt": [{"role": "user", "content": INSTRUCTION.format(question=row["question"])}], "answer": row["answer"]}
        for row in rows
    ]


def tldr_rows(split: str) -> Rows:
    """Return posts that end in "TL;DR:"."""
    rows = load_dataset("trl-lib/tldr", split="train" if split == "train" else "validation")
    return [{"prompt": row["prompt"]} for row in rows]


def imdb_rows(split: str) -> Rows:
    """Return the first words of film reviews, two to eight in turn."""
    rows = load_dataset("stanfordnlp/imdb", split=split)
    return [{"prompt": " ".join(row["text"].split()[: 2 + i % 7])} for i, row in enumerate(rows) if row["text"].strip()]


def positive_logit() -> Callable[..., list[float]]:
    """Return a reward: the logit that a classifier of film reviews gives to "positive"."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlhf_ppo.data.hub import read_weights
    from rlhf_ppo.models.loading import load_tokenizer

    name = "lvwerra/distilbert-imdb"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(name)
    model = read_weights(AutoModelForSequenceClassification, name).to(device).eval()

    def positive(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.no_grad():
            return model(**inputs).logits[:, 1].tolist()

    return positive


RECIPES = {
    "gsm8k": Recipe(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        published="verl: 49.6 % before, 56.7 % after",
        rows=gsm8k_rows,
        reward=lambda: gsm8k,
        settings={
            "total_episodes": 100_000,
            "rollout_batch_size": 1024,
            "num_minibatches": 4,
            "num_epochs": 1,
            "max_new_tokens": 512,
            "overlong_prompts": "drop",
            "learning_rate": 1e-6,
            "value_learning_rate": 1e-5,
            "lr_scheduler_type": "constant",
            "kl_coef": 0.001,
            "eval_every": 10,
            "save_every": 10,
        },
        held_out=1319,
        tiny_rows=[{"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "answer": "#### 5"}],
    ),
    "tldr": Recipe(
        model="cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",
        published="TRL: 64.7 % of the summaries win against people's after PPO, 33.0 % before (another judge)",
        rows=tldr_rows,
        reward=lambda: RewardModel("cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr"),
        settings={
            "total_episodes": 1_000_000,
            "rollout_batch_size": 512,
            "num_minibatches": 1,
            "num_epochs": 4,
            "max_new_tokens": 53,
            "overlong_prompts": "drop",
            "learning_rate": 3e-6,
            "kl_coef": 0.05,
            "missing_eos_penalty": 1.0,
            "temperature": 0.7,
            "eval_every": 50,
            "save_every": 50,
        },
        held_out=512,
        tiny_rows=[{"prompt": "One day, Tom lost his ball. TL;DR:"}],
    ),
    "imdb": Recipe(
        model="lvwerra/gpt2-imdb",
        published="TRL: mean logit -0.51 before, 1.68 after",
        rows=imdb_rows,
        reward=positive_logit,
        settings={
            "total_episodes": 50_000,
            "rollout_batch_size": 256,
            "num_minibatches": 16,
            "max_new_tokens": 16,
            "learning_rate": 1.41e-5,
            "lr_scheduler_type": "constant",
            "kl_coef": 0.2,
            "kl_target": 6.0,
            "eval_every": 20,
            "save_every": 20,
        },
        held_out=512,
        tiny_rows=[{"prompt": "This film was"}],
    ),
}


def tiny_reward(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Stand for a reward model in a dry run: longer words score higher."""
    return [len(text) / max(len(text.split()), 1) for text in completions]


def train(name: str, seed: int, *, tiny: bool) -> dict[str, float]:
    """Train a recipe; return held-out score before and after, and the KL."""
    recipe = RECIPES[name]
    settings = recipe.settings | (TINY if tiny else {})
    trainer = PPOTrainer(
        model="embedded" if tiny else recipe.model,
        reward_funcs=recipe.reward() if not tiny or name == "gsm8k" else tiny_reward,
        args=RLHFConfig(output_dir=f"runs/{name}{'-tiny' if tiny else ''}-{seed}", seed=seed, **settings),
        train_dataset=recipe.tiny_rows * 8 if tiny else recipe.rows("train"),
        eval_dataset=recipe.tiny_rows * 4 if tiny else recipe.rows("test")[: recipe.held_out],
    )
    trainer.train()
    scores = [row for row in trainer.run.read() if "eval/score_mean" in row]
    return {
        "before": scores[0]["eval/score_mean"],
        "after": scores[-1]["eval/score_mean"],
        "kl_nats_per_response": scores[-1]["eval/kl_nats_per_response"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="the embedded model and a few rows, on a CPU")
    flags = parser.parse_args()
    measured = train(flags.name, flags.seed, tiny=flags.tiny)
    print({name: round(value, 4) for name, value in measured.items()})
    print(f"published: {RECIPES[flags.name].published}")


if __name__ == "__main__":
    main()
