"""What sharding costs and saves: ``torchrun --nproc-per-node 2 benchmarks/sharding.py MODEL``.

What you will see: a row for each way to spread the weights, after about two minutes for a model of 15 million
parameters on two CPU cores. Held: weights, gradients and optimizer of one process. Sent: what one process sends in an
update, beside the least that it must.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch.distributed as dist

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.models.sharded.sharding import local_part
from rlhf_ppo.runtime.processes.join import join_processes

WAYS = {
    "none": {"sharding": "none"},
    "full, decoding whole": {"sharding": "full", "sharded_decoding": "whole"},
    "full, decoding by layers": {"sharding": "full", "sharded_decoding": "layers"},
}
EPOCHS, MINIBATCHES = 2, 2


def length(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Reward long responses."""
    return [len(text) / 100 for text in completions]


@contextmanager
def counting(sent: dict[str, int]) -> Iterator[None]:
    """Count the bytes that this process sends in collectives over all processes."""
    names = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
    originals = {name: getattr(dist, name) for name in names}
    others = dist.get_world_size() - 1

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = args[0] if args else next(iter(kwargs.values()))
            whole = output.nbytes * ((others + 1) if name == "reduce_scatter_tensor" else 1)
            # Each sends its share of a whole to every other; a sum on each is a sum of shares, sent on to the others.
            sent[name] = sent.get(name, 0) + (2 if name == "all_reduce" else 1) * whole * others // (others + 1)
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def measure(model: str, way: dict[str, str], tokens: int) -> dict[str, float]:
    """Time the second rollout and update of a run."""
    with tempfile.TemporaryDirectory() as scratch:
        args = RLHFConfig(
            output_dir=join_processes().on_first(lambda: scratch),
            total_episodes=64,
            rollout_batch_size=16,
            max_new_tokens=tokens,
            stop_token_ids=(),
            num_epochs=EPOCHS,
            num_minibatches=MINIBATCHES,
            microbatch_tokens=4 * (tokens + 8),
            device="cpu",
            precision="fp32",
            quiet=True,
            **way,  # pyright: ignore[reportArgumentType]
        )
        trainer = PPOTrainer(model, length, args)
        prompts = ["Once upon a time"] * 16
        trainer.step(trainer.rollout(prompts))
        trainer.fixed.stopwatch.take()
        rollout = trainer.rollout(prompts)
        decoding = trainer.fixed.stopwatch.take()["generate"]
        sent: dict[str, int] = {}
        start = time.perf_counter()
        with counting(sent):
            trainer.step(rollout)
        update = time.perf_counter() - start
        parts = [local_part(p) for p in trainer.model.parameters() if p.requires_grad]
        frozen = trainer.reference.model
        held = 16 * sum(p.numel() for p in parts)
        held += 4 * sum(local_part(p).numel() for p in (frozen.parameters() if frozen is not None else ()))
        # Each process must get what others have added to the gradient, or hold of the weights, once an optimizer step.
        others = (dist.get_world_size() - 1) / dist.get_world_size()
        size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        least = 2 * others * 4 * size * EPOCHS * MINIBATCHES
        numbers = {"held": held, "sent": sum(sent.values()), "least": least}
        return {"decoding": decoding, "update": update, **{name: x / 1e6 for name, x in numbers.items()}}


def main() -> None:
    """Measure each way, and print the table on the first process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    words = parser.parse_args()
    processes = join_processes()
    rows = {name: measure(words.model, way, words.tokens) for name, way in WAYS.items()}
    if processes.first:
        print("| weights | s decoding | s update | MB held | MB sent in an update | least |\n|---|---|---|---|---|---|")
        for name, row in rows.items():
            print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
