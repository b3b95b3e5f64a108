"""Plans for models of 0.5B to 72B on 1 to 64 GPUs as a table: ``python benchmarks/on_paper.py``.

What you will see: a Markdown table after about half a minute; nothing is measured, and no weights are read.
"""

from __future__ import annotations

import argparse

from rlhf_ppo.config.arguments.plan import PlanArgs
from rlhf_ppo.models.costs.terms import total
from rlhf_ppo.pipeline.plan.fit import changes, find_fit
from rlhf_ppo.pipeline.plan.plan import Plan, plan

SIZES = ("0.5B", "1.5B", "7B", "14B", "32B", "72B")
GPUS = (1, 4, 8, 64)
IN_A_NODE = 8
SPREAD = {"none": "replicated", "full": "sharded", "hybrid": "sharded in each node"}


def settings(before: Plan, after: Plan) -> str:
    """What makes it fit, in a few words."""
    changed = changes(before.args, after.args)
    words = [SPREAD[after.setup.sharding]] if after.setup.processes > 1 else []
    if "quantization" in changed:
        words.append("**QLoRA**")
    elif "lora_rank" in changed:
        words.append("**LoRA**")
    if "gradient_checkpointing" in changed:
        words.append("checkpointing")
    if "microbatch_tokens" in changed:
        words.append(f"passes of {after.args.microbatch_tokens:,} tokens")
    if "reference_dtype" in changed:
        words.append(f"reference in {after.args.reference_dtype}")
    return ", ".join(words) or "as it is"


def slowest(found: Plan) -> str:
    """The terms that take most of the time."""
    terms = [(x, phase) for phase, terms in found.times.items() for x in terms]
    most, phase = max(terms, key=lambda pair: pair[0].amount)
    return f"{phase}: {most.what} ({most.amount / found.seconds:.0%})"


def row(size: str, gpus: int, card: str, links: float) -> str:
    """One line of the table."""
    nodes = max(gpus // IN_A_NODE, 1)
    model = f"Qwen/Qwen2.5-{size}"
    long = {"max_new_tokens": 1024, "rollout_batch_size": 128}
    before = plan(PlanArgs(model=model, gpus=gpus, nodes=nodes, card=card, links=links, **long))
    after = find_fit(before)
    if after is None:
        return f"| {size} | {gpus} | does not fit: {before.peak / 1e9:.0f} GB | | | | | |"
    seconds = {phase: total(terms) for phase, terms in after.times.items()}
    update = seconds["update"] + seconds["optimizer steps"]
    times = f"{seconds['generate']:.0f} | {seconds['reference']:.1f} | {update:.0f} | {after.seconds:.0f}"
    return f"| {size} | {gpus} | {settings(before, after)} | {after.peak / 1e9:.0f} | {times} | {slowest(after)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="H100")
    parser.add_argument("--links", type=float, default=3200.0, help="Gbit/s of each node's network")
    args = parser.parse_args()
    print("| Qwen2.5 | GPUs | settings | GB each | generate, s | reference, s | update, s | all, s | what limits it |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in SIZES:
        for gpus in GPUS:
            print(row(size, gpus, args.card, args.links), flush=True)


if __name__ == "__main__":
    main()
