"""Several processes: the same run as one process, to rounding, however the work is divided."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes

from rlhf_ppo import PPOTrainer, RLHFConfig

PROMPTS = ["once upon", "the cat", "a", "dog and cow", "she said", "blue", "no", "why not go"]


def early_letters(prompts: list[Any], completions: list[str], **columns: Any) -> list[float | None]:
    """Share of the characters before n in the alphabet; a short text cannot be scored."""
    return [None if len(c) < 2 else sum("a" <= x < "n" for x in c) / len(c) for c in completions]


def run_in_float64(folder: str, settings: dict[str, Any], given: dict[str, Any], updates: int = 3) -> dict[str, Any]:
    """Train in float64; return tokens, metrics and weights."""
    torch.set_default_dtype(torch.float64)
    try:
        args = {
            "output_dir": f"{folder}/run",
            "total_episodes": 12 * updates,
            "rollout_batch_size": 12,
            "max_new_tokens": 6,
            "stop_token_ids": (0, 12, 16, 20, 24, 28),
            "num_epochs": 2,
            "num_minibatches": 3,
            "learning_rate": 1e-3,
            "device": "cpu",
            "precision": "fp32",
            "microbatch_tokens": 40,
            "quiet": True,
        }
        rows = [{"prompt": prompt} for prompt in PROMPTS]
        trainer = PPOTrainer(
            f"{folder}/model",
            early_letters,
            RLHFConfig(**{**args, **settings}),
            train_dataset=rows,
            eval_dataset=rows[:5],
            **given,
        )
        trainer.model.double()
        if trainer.reference.model is not None:
            trainer.reference.model.double()
        rollouts = []
        keep = lambda trainer, metrics: rollouts.append(metrics)  # noqa: E731
        trainer.callbacks.append(keep)
        last = trainer.train()
        tokens = trainer.rollout(["once upon", "a", "blue"]).response_ids
        weights = {name: p.detach().numpy() for name, p in trainer.model.named_parameters() if p.requires_grad}
        return {"tokens": tokens.numpy(), "metrics": [*rollouts, last], "weights": weights}
    finally:
        torch.set_default_dtype(torch.float32)


def require_equal(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert one["tokens"].tolist() == other["tokens"].tolist()
    for before, after in zip(one["metrics"], other["metrics"], strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert math.isclose(value, after[name], rel_tol=tolerance, abs_tol=tolerance), name
    for name, weight in one["weights"].items():
        assert abs(weight - other["weights"][name]).max() <= tolerance, name


@pytest.fixture
def saved(tmp_path: Path, tokenizer, make_model):
    """``saved(kind)``: a folder with a tiny model in ``model/``."""

    def save(kind: str) -> str:
        make_model(kind).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path)

    return save


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_two_processes_train_as_one(saved, kind):
    folder = saved(kind)
    alone = run_in_float64(folder, {}, {})
    for one in in_processes(2, run_in_float64, folder, {}, {}):
        require_equal(alone, one, 1e-9)
