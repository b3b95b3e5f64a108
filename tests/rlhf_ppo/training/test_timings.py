"""Timings: each phase of an iteration is counted once, in its own name."""

from __future__ import annotations

import json
import time
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from rlhf_ppo.runtime import progress
from rlhf_ppo.runtime.progress import Stopwatch


def test_phases_add_up_and_are_taken_once(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 25.0, 100.0, 107.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    watch = Stopwatch(torch.device("cpu"))
    for name in ("a", "b", "a"):
        with watch.phase(name):
            pass
    assert watch.take() == {"a": 6.0, "b": 2.0}
    assert watch.take() == {}
    # A phase that fails took its time too.
    with pytest.raises(KeyError), watch.phase("c"):
        raise KeyError
    assert watch.take() == {"c": 7.0}


def test_each_iteration_writes_its_own_and_evaluations_are_left_out(make_trainer, prompts, monkeypatch):
    """By a clock that goes on by one second at each look, so that a phase entered once takes one."""
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)), monotonic=time.monotonic)
    monkeypatch.setattr(progress, "time", clock)
    seen = []
    trainer = make_trainer(
        total_episodes=24,
        eval_dataset=[{"prompt": prompts[0]}],
        eval_every=1,
        callbacks=[lambda trainer, metrics: seen.append(dict(trainer.timings))],
    )
    assert trainer.timings == {}
    trainer.train()
    rows = [json.loads(line) for line in (trainer.run.path / "timings.jsonl").read_text().splitlines()]
    assert [row.pop("iteration") for row in rows] == [1, 2, 3]
    assert all(0 < row.pop("generated_tokens") <= 8 * 6 for row in rows)
    assert rows == seen
    assert rows == [{"generate": 1.0, "reference": 1.0, "score": 1.0, "update": 1.0}] * 3
