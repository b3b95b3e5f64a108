"""Batch arithmetic: what the settings make of responses, minibatches, epochs and rollouts, in words."""

from __future__ import annotations

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.pipeline.doctor.findings import Section


def check_batches(section: Section, args: RLHFConfig, prompts: int) -> None:
    """Say how many optimizer steps there are, of how many responses, and how often each prompt is seen."""
    section.ok(rollout_in_words(args))
    run = f"{args.num_rollouts:,} rollouts = {args.num_rollouts * args.rollout_batch_size:,} responses"
    section.ok(f"{run} = {args.num_optimizer_steps:,} optimizer steps")
    each, wanted = args.rollout_batch_size // args.num_generations, args.num_rollouts
    passes = each * wanted / prompts
    seen = f"{prompts:,} prompts, {each} a rollout: each is seen {passes:.3g} times"
    if prompts < each:
        section.warn(
            f"{seen}, some of them several times in one rollout",
            f"add prompts, or lower rollout_batch_size={args.rollout_batch_size}",
        )
    elif passes > 100:
        section.warn(f"{seen}, and may be learned by heart", "add prompts, or lower total_episodes")
    else:
        section.ok(seen)
    if args.rollout_batch_size // args.num_minibatches < 4:
        section.warn(
            f"a minibatch holds {args.rollout_batch_size // args.num_minibatches} responses: its gradient is noisy",
            f"lower num_minibatches={args.num_minibatches}, or raise rollout_batch_size={args.rollout_batch_size}",
        )


def rollout_in_words(args: RLHFConfig) -> str:
    """Say what becomes of a rollout, such as "32 responses = 8 optimizer steps of 8 responses, 2 epochs"."""
    size, minibatch = args.rollout_batch_size, args.rollout_batch_size // args.num_minibatches
    epochs = f"{args.num_epochs} epoch{'' if args.num_epochs == 1 else 's'}"
    groups = f" ({size // args.num_generations} prompts x {args.num_generations})" if args.num_generations > 1 else ""
    steps = args.num_epochs * args.num_minibatches
    alone = args.steps_per_rollout - steps
    more = f", then {alone} of the critic alone" if alone else ""
    return f"{size} responses{groups} = {steps} optimizer steps of {minibatch} responses, {epochs}{more}"
