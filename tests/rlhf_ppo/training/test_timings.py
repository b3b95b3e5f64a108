"""Timings: each phase of an iteration is counted once, in its own name."""

from __future__ import annotations

import json
import time
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from rlhf_ppo.runtime.logs import progress
from rlhf_ppo.runtime.logs.progress import Stopwatch


def test_phases_add_up_and_are_taken_once(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 25.0, 100.0, 107.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    watch = Stopwatch(torch.device("cpu"))
    for name in ("a", "b", "a"):
        with watch.phase(name):
            pass
    assert watch.take() == ({"a": 6.0, "b": 2.0}, {})
    assert watch.take() == ({}, {})
    # A phase that fails took its time too.
    with pytest.raises(KeyError), watch.phase("c"):
        raise KeyError
    assert watch.take().seconds == {"c": 7.0}


def test_a_gpus_peaks_are_each_phases_own(monkeypatch):
    """Peaks go on from what is held at a phase's start; one that is entered twice has the higher of its two."""
    held = {"now": 5, "peak": 50}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(peak=held["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    watch = Stopwatch(torch.device("cuda", 1))
    for name, used in (("generate", 20), ("update", 30), ("update", 10)):
        with watch.phase(name):
            held["peak"] = max(held["peak"], held["now"] + used)
    assert watch.take().peak_bytes == {"generate": 25, "update": 35} and len(waits) == 3
    with watch.phase("score"):
        pass
    assert watch.take().peak_bytes == {"score": 5}


def test_peaks_are_logged_beside_the_seconds(make_trainer, monkeypatch):
    peaks = {"generate": 3, "update": 4}
    monkeypatch.setattr(Stopwatch, "take", lambda self: progress.Phases({"update": 1.0}, peaks))
    trainer = make_trainer(total_episodes=8)
    trainer.train()
    (row,) = trainer.run.read("timings.jsonl")
    assert row["peak_bytes"] == peaks and row["update"] == 1.0 and trainer.timings == {"update": 1.0}


@pytest.mark.cuda
def test_a_gpus_phases_all_have_a_peak(make_trainer):
    trainer = make_trainer(device="cuda", generation="dynamic")
    trainer.train()
    weights = sum(p.nbytes for p in trainer.model.parameters())
    for row in trainer.run.read("timings.jsonl"):
        assert row["peak_bytes"].keys() == {"generate", "reference", "score", "update"}
        # Weights, moments and the reference's copy are always held, gradients in the update.
        assert row["peak_bytes"]["update"] > 5 * weights and min(row["peak_bytes"].values()) > 2 * weights


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
    # Generation is prepared, and then done.
    assert rows == [{"generate": 2.0, "reference": 1.0, "score": 1.0, "update": 1.0, "record": 1.0}] * 3
