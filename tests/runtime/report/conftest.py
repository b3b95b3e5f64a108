"""Run folders as both frontends write them, without a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ppo.runtime.logs.tables import STEPS, TOKENS, write_table

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>{{ 7*7 }}"
"""What a model may write."""


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def language_updates(count: int, gain: float = 0.03, shift: float = 0.0) -> list[dict[str, float]]:
    return [
        {
            "progress/iteration": i,
            "progress/episodes": 32 * i,
            "policy/loss": -0.01,
            "score/mean": 0.4 + gain * i + 0.01 * math.sin(7 * i) + shift,
            "score/std": 0.3,
            "kl/reference_nats_per_response": 0.3 * i,
            "policy/entropy": 2 - 0.02 * i,
            "value/explained_variance": 0.02 * i,
            "policy/clip_fraction": 0.1,
            "policy/approx_kl": 0.01,
            "response/length_tokens": 48.0,
            "response/repeated_fraction": 0.01,
            "response/distinct_2": 0.6,
        }
        for i in range(1, count + 1)
    ]


def evaluation(iteration: int, score: float, said: str) -> list[dict[str, Any]]:
    return [
        {
            "iteration": iteration,
            "prompt": f"Prompt {i}",
            "completion": f"{said} {i}",
            "score": score + 0.01 * i,
            "kl_nats": 0.2 * iteration,
            "tokens": 3,
            "finished": True,
        }
        for i in range(8)
    ]


def token_columns(count: int = 12) -> dict[str, list[Any]]:
    numbers = {
        name: [math.sin(3 * i + len(name)) for i in range(2 * count)]
        for name, column in TOKENS.items()
        if column.kind == "float32"
    }
    return {
        **numbers,
        "ratio": [1 + 0.3 * math.sin(i) for i in range(2 * count)],
        "response": [i // count for i in range(2 * count)],
        "position": [i % count for i in range(2 * count)],
        "token": list(range(2 * count)),
        "text": [HOSTILE if i == 3 else f" word{i}" if i % 5 else "\n" for i in range(2 * count)],
        "clipped": ["above" if i % 4 == 0 else "" for i in range(2 * count)],
        "gradient_alive": [i % 4 != 0 for i in range(2 * count)],
    }


def make_language_run(
    folder: Path, updates: int = 12, *, gain: float = 0.03, shift: float = 0.0, **settings: Any
) -> Path:
    """Write a language model's run that learned."""
    folder.mkdir()
    facts = {
        "reward": ["toy:positive"],
        "model": "tiny",
        "total_episodes": 32 * updates,
        "seed": 0,
        "kl_coef": 0.05,
    }
    (folder / "run.json").write_text(json.dumps({**facts, **settings}))
    write_lines(folder / "metrics.jsonl", language_updates(updates, gain, shift))
    said = [
        {
            "iteration": i,
            "prompt": "Once",
            "completion": f"upon {i} {HOSTILE}",
            "score": 0.5,
            "tokens": 12,
            "finished": True,
        }
        for i in range(1, updates + 1)
        for _ in range(2)
    ]
    write_lines(folder / "samples.jsonl", said)
    write_lines(
        folder / "eval_samples.jsonl",
        [*evaluation(0, 0.4, "a grey day"), *evaluation(updates, 0.4 + gain * updates, f"a fine {HOSTILE} day")],
    )
    write_lines(
        folder / "timings.jsonl",
        [{"iteration": i, "generated_tokens": 900, "generate": 0.2, "update": 0.5} for i in range(1, updates + 1)],
    )
    for number in (1, updates):
        write_table(folder, "tokens", number, token_columns())
        rows = range(8)
        write_table(
            folder,
            "responses",
            number,
            {
                "response": list(rows),
                "score": [0.1 * i for i in rows],
                "tokens": [10 + i for i in rows],
                "finished": [True] * 8,
                "kl": [0.1] * 8,
                "repeated": [0.0] * 8,
            },
        )
    return folder


@pytest.fixture
def language_run(tmp_path) -> Callable[..., Path]:
    """``language_run(name="run", updates=12, **settings)``: see :func:`make_language_run`."""
    return lambda name="run", updates=12, **settings: make_language_run(tmp_path / name, updates, **settings)


@pytest.fixture
def control_run(tmp_path) -> Callable[..., Path]:
    """``control_run(name="agent", seed=0)``: a control task's run that learned."""

    def make(name: str = "agent", *, updates: int = 12, seed: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        args = {"seed": seed, "total_timesteps": 1000 * updates, "gamma": 0.99}
        (folder / "run.json").write_text(json.dumps({"env_id": "CartPole-v1", "args": args}))
        rows = [
            {
                "progress/iteration": i,
                "progress/env_steps": 1000 * i,
                "policy/loss": 0.0,
                "episode/return_mean": 20.0 * i + seed + math.sin(i),
                "policy/entropy": 0.6,
                "policy/approx_kl": 0.01,
                "policy/clip_fraction": 0.1,
                "value/explained_variance": 0.9,
            }
            for i in range(1, updates + 1)
        ]
        last = {
            "progress/iteration": updates,
            "progress/env_steps": 1000 * updates,
            "eval/mean_return": 250.0,
            "eval/std_return": 3.0,
        }
        write_lines(folder / "metrics.jsonl", [*rows, last])
        numbers = {name: [0.1 * i for i in range(20)] for name, column in STEPS.items() if column.kind == "float32"}
        write_table(
            folder,
            "steps",
            updates,
            {
                **numbers,
                "copy": [i // 10 for i in range(20)],
                "step": [i % 10 for i in range(20)],
                "action": ["1"] * 20,
                "clipped": [""] * 20,
                "ended": ["terminated" if i == 9 else "" for i in range(20)],
                "gradient_alive": [True] * 20,
            },
        )
        return folder

    return make
