"""Several processes: the same run as one process, to rounding, however the work is divided.

In float64, so that what differs is seen: a rollout of 12 responses in minibatches of 4, so that with three processes
some have a single response and with four every minibatch leaves one or more with hardly any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from float64_runs import PROMPTS, SMALL, early_letters, require_equal
from peft import LoraConfig
from processes import in_processes

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.rewards.functions import StepRewards

Case = dict[str, Any]
"""Settings, and arguments of the trainer: those that cannot travel to another process are made there from a name."""


def rank_in_rollout(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Score the responses against each other: the share of the rollout's texts that come before each."""
    return [sum(other < one for other in completions) / len(completions) for one in completions]


rank_in_rollout.whole_rollout = True  # pyright: ignore[reportFunctionMemberAccess]


def letters_as_steps(prompts: list[Any], completions: list[str], **columns: Any) -> list[StepRewards]:
    """Score each letter on the token that completes it."""
    return [StepRewards([(i + 1, float(x < "n")) for i, x in enumerate(text)]) for text in completions]


def logging_letters(
    prompts: list[Any], completions: list[str], log_metric: Any, log_extra: Any, **columns: Any
) -> list[float]:
    """Log a mean over the responses of each call, and a column."""
    log_metric("length", sum(map(len, completions)) / len(completions))
    log_extra("capitals", [text.upper() for text in completions])
    return early_letters(prompts, completions)


def some_alike(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Score half of the prompts' responses alike."""
    return [0.5 if len(p) % 2 else x for p, x in zip(prompts, early_letters(prompts, completions), strict=True)]


def letters_of_conversation(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [sum(str(said).count(x) for x in "abcde") / 10 for said in completions]


def ask_again(messages: list[dict[str, str]]) -> str | None:
    """Reply twice, unless the policy has said an early letter first."""
    said = messages[-1]["content"]
    return None if said[:1] < "e" else " go on"


class Spelling:
    """Extend the prompt, and reward each turn for its early letters."""

    async def reset(self, row: dict[str, Any]) -> str:
        return row["prompt"] + " so"

    def step(self, messages: list[dict[str, str]]) -> tuple[str, float, bool]:
        said = messages[-1]["content"]
        return " go on", sum("a" <= x < "n" for x in said) / 7 + len(said) / 71, said[:1] < "e"


GIVEN = ("reward_funcs", "value_model", "ref_model", "respond", "environment")


def train(folder: str, case: Case, updates: int = 3) -> dict[str, Any]:
    """Train in float64; return the tokens sampled afterwards, all metrics, and the trained weights.

    With ``record`` in the case, record instead, and return the tokens and what was recorded beside them.
    """
    torch.set_default_dtype(torch.float64)
    case = dict(case)
    given = {name: case.pop(name) for name in GIVEN if name in case}
    record = case.pop("record", False)
    if rank := case.pop("lora", None):
        given["peft_config"] = LoraConfig(r=rank, target_modules="all-linear")
    own = {"output_dir": f"{folder}/run", "total_episodes": 12 * updates, "num_threads": 1}
    settings = {**SMALL, **own}
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    metrics: list[dict[str, float]] = []
    try:
        trainer = PPOTrainer(
            f"{folder}/model",
            args=RLHFConfig(**{**settings, **case}),
            train_dataset=rows,
            eval_dataset=rows[:5],
            callbacks=[lambda trainer, now: metrics.append(now)],
            **{"reward_funcs": early_letters, **given},
        )
        trainer.model.double()
        if trainer.reference.model is not None:
            trainer.reference.model.double()
        if record:
            rollouts = list(trainer.record())
            kept = [(n, i) for n in ("logprobs", "values", "ref_logprobs", "scores") for i in range(updates)]
            tensors = {f"{name} {i}": getattr(rollouts[i], name).numpy() for name, i in kept}
            return {"tokens": [x.response_ids.tolist() for x in rollouts], "metrics": [], "weights": tensors}
        last = trainer.train()
        rollout = trainer.rollout(PROMPTS)
        tokens = [rollout.response_ids.tolist(), rollout.logged_columns]
    finally:
        torch.set_default_dtype(torch.float32)
    weights = {name: p.detach().numpy() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {"tokens": tokens, "metrics": [*metrics, last], "weights": weights}


def train_all(folder: str, cases: list[Case]) -> list[dict[str, Any]]:
    return [train(folder, case) for case in cases]


@pytest.fixture
def saved(tmp_path: Path, tokenizer, make_model):
    """``saved(kind)``: a folder with a tiny model in ``model/`` and another in ``other/``."""

    def save(kind: str) -> str:
        for name, seed in (("model", 0), ("other", 1)):
            make_model(kind, seed=seed).save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path)

    return save


CASES: dict[str, Case] = {
    "plain": {},
    "groups": {"num_generations": 4, "advantage_estimator": "grpo"},
    "leave one out": {"num_generations": 2, "advantage_estimator": "rloo", "loss_aggregation": "sequence_mean"},
    "controllers": {"kl_target": 0.5, "normalize_scores": True, "target_kl": 0.002, "objective": "adaptive_clip"},
    "exact KL": {"kl_loss_coef": 0.1, "kl_loss": "exact", "kl_coef": 0.0, "ent_coef": 0.01},
    "conversations": {"respond": ask_again, "max_turns": 3, "reward_funcs": letters_of_conversation},
    "resample": {
        "reward_funcs": some_alike,
        "num_generations": 2,
        "advantage_estimator": "grpo",
        "zero_signal_prompts": "resample",
        "zero_signal_rounds": 2,
    },
    "logs": {"reward_funcs": logging_letters},
    "environment": {"environment": Spelling, "max_turns": 3, "reward_funcs": None, "whole_rollout_rewards": True},
    "whole rollout": {"reward_funcs": [rank_in_rollout, letters_as_steps], "cache_rewards": True},
    "adapter": {"lora": 2, "critic": "adapter"},
    "separate critic": {"critic_epochs": 3, "critic_warmup_rollouts": 1, "recompute_logprobs": True},
    "rows by the one": {"rollout_batch_size": 3, "num_minibatches": 1, "total_episodes": 9, "temperature": 0.7},
}
"""What is divided, or summed, in another way each."""


def _cases(folder: str, names: list[str]) -> list[Case]:
    return [
        {**CASES[name], **({"value_model": f"{folder}/model"} if name == "separate critic" else {})} for name in names
    ]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_two_processes_give_what_one_gives(saved, kind):
    names = list(CASES) if kind == "gpt2" else ["plain", "conversations", "adapter"]
    folder = saved(kind)
    cases = _cases(folder, names)
    alone = train_all(folder, cases)
    for found in in_processes(2, train_all, folder, cases):
        for one, other in zip(alone, found, strict=True):
            require_equal(one, other)


def test_two_processes_record_and_replay_what_one_does(saved):
    """The last run replays with another critic and another reference, which are read again."""
    folder = saved("gpt2")
    recorded = {"record": True, "output_dir": f"{folder}/recorded", "reward_funcs": letters_as_steps}
    replays = {"replay": f"{folder}/recorded", "reward_funcs": letters_as_steps}
    cases = [recorded, replays, {**replays, "value_model": f"{folder}/model", "ref_model": f"{folder}/other"}]
    alone = train_all(folder, cases)
    for found in in_processes(2, train_all, folder, cases):
        for one, other in zip(alone, found, strict=True):
            require_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("objective", ["clip", "penalty", "dual_clip", "a2c", "reinforce", "cispo"])
def test_three_and_four_processes_give_what_one_gives(saved, count, objective):
    folder = saved("gpt2")
    cases = [{**case, "objective": objective} for case in ({}, {"rollout_batch_size": 3, "num_minibatches": 1})]
    if objective == "clip":
        cases = _cases(folder, list(CASES))
    alone = train_all(folder, cases)
    for found in in_processes(count, train_all, folder, cases):
        for one, other in zip(alone, found, strict=True):
            require_equal(one, other)
