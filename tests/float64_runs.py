"""Runs in float64 whose numbers must not depend on how many processes share them, or how; called in processes."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.models.adapters import quantization
from rlhf_ppo.models.sharded.sharding import is_share, local_part, whole_tensor
from rlhf_ppo.runtime.machine.signals import Interrupted
from rlhf_ppo.training.models import load_models

PROMPTS = ["once upon", "the cat", "a", "dog and cow", "she said", "blue", "no", "why not go"]


SMALL: dict[str, Any] = {
    "total_episodes": 36,
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
"""Settings of a small run, with ragged lengths."""


def early_letters(prompts: list[Any], completions: list[str], **columns: Any) -> list[float | None]:
    """Share of the characters before n in the alphabet; a text that begins with an x cannot be scored.

    A little for the length keeps every score off the mean: at an advantage of 0, rounding decides what is clipped.
    """
    return [None if c[:1] == "x" else sum("a" <= x < "n" for x in c) / 7 + len(c) / 71 for c in completions]


def make_trainer(folder: str, settings: dict[str, Any], given: dict[str, Any]) -> PPOTrainer:
    """Return a small trainer that computes in float64, of the model in ``folder/model``."""
    args = {**SMALL, "output_dir": f"{folder}/run"}
    given = dict(given)
    if (rank := given.pop("lora_rank", None)) is not None:
        from rlhf_ppo.models.adapters.lora import lora_config

        given["peft_config"] = lora_config(rank)
    if given.pop("talks", False):
        given["respond"] = read_pages
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    model = given.pop("model", None) or load_float64(f"{folder}/model")
    if given.pop("critic", None) == "separate":
        given["value_model"] = model if isinstance(model, str) else load_float64(f"{folder}/model")
    given = {"train_dataset": rows, "eval_dataset": rows[:5], **given}
    rewards = [early_letters, f"{folder}/judge"] if given.pop("judge", False) else early_letters
    return PPOTrainer(model, rewards, args=RLHFConfig(**{**args, **settings}), **given)


def load_float64(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def loaded_weights(folder: str, settings: dict[str, Any], given: dict[str, Any], deferred: bool) -> dict[str, Any]:
    """Return the weights and the reference's digest before any update; ``deferred``: nothing may be loaded whole."""
    if deferred:
        load_models.load_policy = load_models.load_trunk = quantization.load_policy = None  # pyright: ignore
    trainer = make_trainer(folder, settings, {**given, "model": f"{folder}/model"})
    head = trainer.model.runner.head is not None
    return {**weights_of(trainer), "reference": trainer.fingerprints["reference"], "plain head": head}


def weights_of(trainer: PPOTrainer) -> dict[str, Any]:
    named = trainer.model.named_parameters()
    return {name: whole_tensor(p.detach()).clone().numpy() for name, p in named if p.requires_grad}


def bytes_held(trainer: PPOTrainer) -> tuple[int, int]:
    """Return the bytes of weights and optimizer that this process holds, and those of all that are whole anywhere."""
    parameters = list(trainer.model.parameters())
    moments = [x for entry in trainer.optimizer.state.values() for x in entry.values()]
    storages = [x.untyped_storage() for x in [*map(local_part, parameters), *moments]]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return held, sum(3 * p.numel() * p.element_size() for p in parameters)


def spoil_one_gradient(trainer: PPOTrainer) -> None:
    """Let the last process's gradient of the fifth minibatch be NaN in one number of a matrix."""
    calls, plain = 0, trainer.fixed.gradient

    def gradient(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        found = plain(model, *args, **kwargs)
        if calls == 5 and trainer.fixed.processes.rank == trainer.fixed.processes.size - 1:
            matrix = next(p for p in model.parameters() if p.ndim == 2 and p.grad is not None)
            part = matrix.grad.to_local() if is_share(matrix) else matrix.grad
            part[-1, -1] = math.nan
        return found

    trainer.fixed = dataclasses.replace(trainer.fixed, gradient=gradient)


def read_pages(prompts: list[dict[str, str]]) -> str | None:
    """Reply once or twice, depending on what the policy said."""
    said = prompts[-1]["content"]
    return None if said[:1] < "e" or len(prompts) > 3 else " go on"


def train(
    folder: str,
    settings: dict[str, Any],
    given: dict[str, Any] | None = None,
    resume: str | None = None,
    until: int | None = None,
    spoil: bool = False,
) -> dict[str, Any]:
    """Train in float64, at most ``until`` an iteration; return sampled tokens, metrics, weights and bytes held."""
    torch.set_default_dtype(torch.float64)
    try:
        trainer = make_trainer(folder, settings, given or {})
        if spoil:
            spoil_one_gradient(trainer)
        metrics: list[dict[str, float]] = []

        def keep(trainer: PPOTrainer, now: dict[str, float]) -> bool:
            metrics.append(now)
            return trainer.iteration == until

        trainer.callbacks.append(keep)
        last = trainer.train(resume_from_checkpoint=resume)
        tokens = trainer.rollout(["once upon", "a", "blue"]).response_ids  # three: some of four processes have none
        found = {"tokens": tokens.tolist(), "metrics": [*metrics, last], "weights": weights_of(trainer)}
        judges = [getattr(function, "together", False) for function, _ in trainer.fixed.rewards.values()]
        return {
            **found,
            "bytes": bytes_held(trainer),
            "shared judges": sum(judges),
            "exchanged": trainer.fixed.processes.bytes_exchanged,
        }
    finally:
        torch.set_default_dtype(torch.float32)


def train_on_machines_of_two(*args: Any) -> dict[str, Any]:
    """Train as if every two processes were on a machine of their own."""
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(int(os.environ["RANK"]) % 2)}
    return train(*args)


def stop_while_sampling(folder: str, settings: dict[str, Any]) -> tuple[int, str]:
    """Have the last process get SIGTERM while it samples the second rollout; return exit code and checkpoint."""
    trainer = make_trainer(folder, settings, {"model": f"{folder}/model", "eval_dataset": None})
    sample, calls = trainer.fixed.sample, 0

    def stop_second(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and trainer.fixed.processes.rank == trainer.fixed.processes.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **kwargs)

    trainer.fixed = dataclasses.replace(trainer.fixed, sample=stop_second)
    try:
        trainer.train()
    except Interrupted as stop:
        return stop.exit_code, str(stop.saved)
    return 0, ""


def train_in_bfloat16(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Train a model of float32 weights; return the metrics of each update."""
    folder, metrics = str(Path(settings["output_dir"]).parent), list[dict[str, float]]()
    trainer = make_trainer(folder, settings, {"model": f"{folder}/model"})
    trainer.callbacks.append(lambda _, now: metrics.append(now))
    trainer.train()
    return metrics


def require_equal(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-9) -> None:
    """Require equal tokens, and equal metrics and weights to rounding."""
    assert one["tokens"] == other["tokens"]
    assert len(one["metrics"]) == len(other["metrics"])
    for before, after in zip(one["metrics"], other["metrics"], strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            same = math.isclose(value, after[name], rel_tol=tolerance, abs_tol=tolerance)
            assert same or math.isnan(value) is math.isnan(after[name]) is True, (name, value, after[name])
    for name, weight in one["weights"].items():
        assert abs(weight - other["weights"][name]).max() <= tolerance, name
