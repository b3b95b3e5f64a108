"""Measure one and two threads, spinning and sleeping, on an idle and on a busy machine.

Run:  python benchmarks/threads.py        (about twenty minutes, on an otherwise idle machine)
PPO iterations of the embedded model and of workload M's GPT-2, each in its own process. "spins" is how OpenMP
waits by default (torch imported before rlhf_ppo), "sleeps" is OMP_WAIT_POLICY=PASSIVE, which this project sets. Busy:
one endlessly computing process per CPU. Prints an iteration's time relative to one thread on the idle machine, or
that it was given up (--limit).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAYS = {"sleeps": "import rlhf_ppo, torch", "spins": "import torch, rlhf_ppo"}
"""The order of the imports decides: libgomp reads its settings once, when torch loads it."""

MODELS = ("embedded", "M")


def make_trainer(model: str, folder: str) -> Any:
    from speed_worker import trainer_for
    from speed_workloads import WORKLOADS

    from rlhf_ppo.pipeline.demo import DemoArgs, demo_trainer

    if model == "embedded":
        return demo_trainer(DemoArgs(output_dir=folder))
    return trainer_for(WORKLOADS[model], folder, separate_critic=False, precision="auto")[0]


def work(model: str, threads: int, seconds: float) -> None:
    """Iterate for about ``seconds`` after a warm-up; print the seconds of each iteration."""
    import torch

    torch.set_num_threads(threads)
    took: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, folder)
        size = trainer.args.rollout_batch_size
        while len(took) < 2 or sum(took[1:]) < seconds:
            started = time.perf_counter()
            trainer.step(trainer.rollout(trainer.train_prompts.batch(len(took), size).prompts))
            took.append(time.perf_counter() - started)
    print(json.dumps(took[1:]))


def measure(model: str, threads: int, way: str, seconds: float, limit: float) -> list[float]:
    """Return an iteration's seconds; infinite if start-up and two iterations exceed ``limit``."""
    code = f"{WAYS[way]}; from threads import work; work({model!r}, {threads}, {seconds})"
    unset = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    here = Path(__file__).resolve().parent
    environment["PYTHONPATH"] = os.pathsep.join((str(here), str(here.parent)))
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return [math.inf]
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Start this many endlessly computing processes."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2, help="how often each is measured, alternating")
    parser.add_argument("--seconds", type=float, default=10.0, help="minimum time of each, at least one iteration")
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds after which a run is given up, start-up included"
    )
    flags = parser.parse_args()
    cases = list(itertools.product(flags.models, (False, True), flags.threads, WAYS))
    took: dict[tuple[str, bool, int, str], list[float]] = {case: [] for case in cases}
    for _ in range(flags.rounds):
        for case in cases:
            model, busy, threads, way = case
            with load((os.cpu_count() or 1) if busy else 0):
                took[case] += measure(model, threads, way, flags.seconds, flags.limit)
            print(model, "busy" if busy else "idle", threads, way, [f"{x:.2f}" for x in took[case]], file=sys.stderr)
    print("\n| model | machine | threads | sleeps (this project) | spins (OpenMP's default) |")
    print("|---|---|---|---|---|")
    for model, busy, threads in itertools.product(flags.models, (False, True), flags.threads):
        base = statistics.median(took[model, False, flags.threads[0], "sleeps"])
        medians = [statistics.median(took[model, busy, threads, way]) for way in WAYS]
        cells = [f"{x / base:.2f}" if math.isfinite(x) else "given up" for x in medians]
        print(f"| {model} | {'busy' if busy else 'idle'} | {threads} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
