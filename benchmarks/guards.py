"""Measure the cost of the non-finite checks: their share of an update's CPU time, on one thread.

Run:  python benchmarks/guards.py --workload S --updates 4        (half a minute on an idle CPU core)
Timed inside the update: the checks of each step (StepWatch), of losses and estimates (spoil_gradient) and of weights
(nonfinite_parameters). Clipping needs the gradient's norm anyway. It measures a share of CPU time, not a difference of
two times, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from speed_worker import trainer_for
from speed_workloads import WORKLOADS, make_prompts

import rlhf_ppo.training.update


def timed(call: Callable[..., Any], took: list[float]) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        started = time.process_time()
        try:
            return call(*arguments)
        finally:
            took.append(time.process_time() - started)

    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=tuple(WORKLOADS), default="S")
    parser.add_argument("--updates", type=int, default=4)
    args = parser.parse_args()
    work, module = WORKLOADS[args.workload], rlhf_ppo.training.update
    torch.set_num_threads(1)
    checks: list[float] = []
    updates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = trainer_for(work, folder, separate_critic=False, precision="fp32")
        trainer.step(trainer.rollout(make_prompts(work)))  # warms up
        with (
            patch.object(module, "spoil_gradient", timed(module.spoil_gradient, checks)),
            patch.object(module, "nonfinite_parameters", timed(module.nonfinite_parameters, checks)),
            patch.object(module.StepWatch, "settle", timed(module.StepWatch.settle, checks)),
        ):
            for _ in range(args.updates):
                timed(trainer.step, updates)(trainer.rollout(make_prompts(work)))
    share = sum(checks) / sum(updates)
    print(f"{args.workload}: {args.updates} updates of {sum(updates) / args.updates:.1f} s, checks {share:.2%} of them")


if __name__ == "__main__":
    main()
