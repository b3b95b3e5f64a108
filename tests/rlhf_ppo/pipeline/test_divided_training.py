"""sft, reward and critic fit over several processes: weights and metrics of one process, to rounding, in float64."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from processes import in_processes, require_close

from rlhf_ppo.config.arguments.critic_fit import CriticFitArgs
from rlhf_ppo.pipeline.critic import critic_fit, models
from rlhf_ppo.pipeline.labelled import reward_training, sft, supervised

Found = dict[str, Any]


def in_float64(stack: ExitStack) -> None:
    """Compute in float64 within the block: models, and the logits that libraries would convert to float32."""
    torch.set_default_dtype(torch.float64)
    stack.callback(torch.set_default_dtype, torch.float32)
    stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
    loaders = [(sft, "_load_model"), (reward_training, "_load_model"), (models, "load_policy"), (models, "load_trunk")]
    for module, name in loaders:
        load: Callable[..., Any] = getattr(module, name)
        stack.enter_context(patch.object(module, name, lambda *args, load=load: load(*args).double()))


def trained(train: Callable[[Any], dict[str, float]], args: Any) -> Found:
    """Train in float64; returns the metrics, each step's numbers, and the weights before they are rounded."""
    steps: list[dict[str, float]] = []
    weights: dict[str, Any] = {}
    with ExitStack() as stack:
        in_float64(stack)
        stack.enter_context(patch("rlhf_ppo.pipeline.labelled.reward_training.plot_calibration"))
        stack.enter_context(patch.object(supervised, "require_saved"))  # what is saved is in float32

        def note(self: Any, done: int, **numbers: float) -> None:
            steps.append({"done": done, **numbers})

        def keep(model: Any, dtype: str, where: str) -> None:
            weights.update({name: p.detach().numpy().copy() for name, p in model.named_parameters()})

        stack.enter_context(patch("rlhf_ppo.runtime.logs.progress.ProgressDisplay.update", note))
        for module in (sft, reward_training):
            stack.enter_context(patch.object(module, "round_trained", keep))
        metrics = train(args)
    return {"metrics": [metrics, *steps], "weights": weights}


def require_equal(one: Found, other: Found, tolerance: float = 1e-9) -> None:
    assert len(one["metrics"]) == len(other["metrics"])
    for before, after in zip(one["metrics"], other["metrics"], strict=True):
        assert before == pytest.approx(after, rel=tolerance, abs=tolerance)
    assert one["weights"].keys() == other["weights"].keys()
    for name, weight in one["weights"].items():
        assert abs(weight - other["weights"][name]).max() <= tolerance, name


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def saved(tmp_path, tokenizer, make_model) -> Callable[[str], str]:
    """``saved(kind)``: a folder with a tiny model without dropout, of which each process draws its own."""

    def save(kind: str) -> str:
        model = make_model(kind)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if hasattr(model.config, name):
                setattr(model.config, name, 0.0)
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return save


def word(draw: random.Random, most: int) -> str:
    return "".join(draw.choices("abcdefg", k=draw.randint(1, most)))


@pytest.fixture
def texts(tmp_path) -> str:
    """Prompts with completions, of which the longest has ten times the tokens of the shortest."""
    draw = random.Random(0)
    rows = [{"prompt": word(draw, 5), "completion": word(draw, 20)} for _ in range(31)]
    return write(tmp_path / "texts.jsonl", rows)


@pytest.fixture
def pairs(tmp_path) -> str:
    draw = random.Random(0)
    rows = [
        {"prompt": word(draw, 4), "chosen": word(draw, 12) + "x", "rejected": word(draw, 12), "margin": 0.3}
        for _ in range(24)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


def train_sft(cases: list[dict[str, Any]]) -> list[Found]:
    return [trained(sft.sft, sft.SFTArgs(**case)) for case in cases]


def train_reward(cases: list[dict[str, Any]]) -> list[Found]:
    return [trained(reward_training.train_reward_model, reward_training.RewardTrainingArgs(**case)) for case in cases]


def require_same_in(count: int, train: Callable[..., list[Found]], cases: list[dict[str, Any]]) -> None:
    alone = train(cases)
    for found in in_processes(count, train, cases):
        for one, other in zip(alone, found, strict=True):
            require_equal(one, other)
            assert one["weights"] and math.isfinite(sum(one["metrics"][0].values()))


def sft_cases(saved: Callable[[str], str], texts: str, folder: Path) -> list[dict[str, Any]]:
    usual = {"dataset": texts, "prompt_column": "prompt", "completion_column": "completion", "quiet": True}
    usual |= {"output_dir": str(folder / "out"), "num_threads": 1, "learning_rate": 1e-2, "warmup_steps": 0}
    return [
        # 28 rows in batches of 5: the last has 3. Two epochs in another order each.
        {**usual, "model": saved("gpt2"), "batch_size": 5, "num_epochs": 2.0, "eval_fraction": 0.1},
        # A batch of 1 leaves all processes but one with no row; 1 row is held out.
        {**usual, "model": saved("llama"), "batch_size": 1, "num_epochs": 0.2, "eval_fraction": 0.01},
    ]


def reward_cases(saved: Callable[[str], str], pairs: str, folder: Path) -> list[dict[str, Any]]:
    usual = {"dataset": pairs, "output_dir": str(folder / "rm"), "learning_rate": 1e-2, "device": "cpu", "seed": 3}
    usual |= {"precision": "fp32", "num_threads": 1, "quiet": True, "warmup_steps": 0, "eval_fraction": 0.2}
    return [
        {**usual, "model": saved("gpt2"), "batch_size": 7, "margin_column": "margin", "centering": 0.01},
        {**usual, "model": saved("llama"), "batch_size": 1, "lora_rank": 2, "num_epochs": 1},
    ]


def test_two_processes_fine_tune_as_one(saved, texts, tmp_path):
    require_same_in(2, train_sft, sft_cases(saved, texts, tmp_path))


def test_two_processes_train_the_reward_model_of_one(saved, pairs, tmp_path):
    require_same_in(2, train_reward, reward_cases(saved, pairs, tmp_path))


def fit_critics(cases: list[dict[str, Any]]) -> list[Any]:
    found = []
    for case in cases:
        with ExitStack() as stack:
            in_float64(stack)
            result = critic_fit.fit_critic(CriticFitArgs(**case))
        found.append([result.history, result.report, result.facts.held_out, result.facts.probe])
    return found


@pytest.fixture
def critics(saved, make_trainer, tmp_path) -> list[dict[str, Any]]:
    """A critic of each kind, on two rollouts of 12 responses."""
    run, policy = str(tmp_path / "run"), saved("gpt2")
    trainer = make_trainer(model=policy, output_dir=run, rollout_batch_size=12, total_episodes=24, num_minibatches=1)
    trainer.record()
    usual = {"rollouts": (run,), "output_dir": str(tmp_path / "critic"), "quiet": True, "device": "cpu"}
    usual |= {"precision": "fp32", "microbatch_tokens": 60, "num_threads": 1, "eval_fraction": 0.3}
    trained = {**usual, "num_epochs": 2, "batch_size": 5, "learning_rate": 1e-2}
    return [
        {**usual, "kind": "shared"},
        {**trained, "kind": "separate", "value_model": policy},
        {**trained, "kind": "adapter", "lora_rank": 2},
    ]


def test_two_processes_fit_the_critics_of_one(critics):
    alone = fit_critics(critics)
    for found in in_processes(2, fit_critics, critics):
        require_close(alone, found)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4])
def test_three_and_four_processes_train_as_one(saved, texts, pairs, critics, tmp_path, count):
    require_same_in(count, train_sft, sft_cases(saved, texts, tmp_path))
    require_same_in(count, train_reward, reward_cases(saved, pairs, tmp_path))
    alone = fit_critics(critics)
    for found in in_processes(count, fit_critics, critics):
        require_close(alone, found)
