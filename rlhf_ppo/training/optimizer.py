"""Optimizer and schedule: policy and critic in one AdamW, each at its own learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.sharded.sharding import local_part


def make_optimizer(model: ActorCritic, args: RLHFConfig) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Make one fused AdamW over all trainable parameters, and its schedule.

    The first parameter group is the policy's; the second, if there is a critic, holds what learns from the value loss
    alone, its value head above all. Each has its own learning rate; both share the schedule's shape: linear warm-up,
    then ``lr_scheduler_type``. The policy's schedule starts after the critic's warm-up.
    """
    assert args.learning_rate is not None  # resolve_learning_rates has filled it in
    rates = (args.learning_rate, args.learning_rate if args.value_learning_rate is None else args.value_learning_rate)
    groups = [
        {"params": [local_part(p) for p in parameters], "lr": rate}
        for parameters, rate in zip((model.policy_parameters(), model.critic_parameters()), rates, strict=True)
        if parameters
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    delay = args.critic_warmup_rollouts * args.steps_per_rollout
    factors = [partial(_factor, args=args, delay=steps) for steps in (delay, 0)]
    return optimizer, LambdaLR(optimizer, factors[: len(groups)])


def _factor(step: int, *, args: RLHFConfig, delay: int) -> float:
    """Compute the share of the learning rate at an optimizer step; the schedule starts after ``delay`` steps."""
    step, total = max(step - delay, 0), args.num_optimizer_steps - delay
    if step < args.warmup_steps:
        return step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, total - args.warmup_steps)
    match args.lr_scheduler_type:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1.0 - progress)
        case "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def critic_warmup_settings(args: RLHFConfig) -> RLHFConfig:
    """Return the settings under which the critic alone is trained.

    Monte Carlo returns, because its values are not yet worth bootstrapping from; no value clipping, which would hold
    them near their start; no KL loss and no positive examples, because the policy does not change.
    """
    critic_alone = {"gae_lambda_value": None, "clip_range_vf": None, "kl_loss_coef": 0.0, "kl_loss": "k2"}
    critic_alone |= {"positive_loss_coef": 0.0, "positive_score_above": 0.0}
    return dataclasses.replace(args, gae_lambda=1.0, **critic_alone)


@contextmanager
def train_critic_alone(model: ActorCritic, *, on: bool = True) -> Iterator[None]:
    """Freeze the policy inside, the trunk that a critic shares included; ``on=False`` does nothing."""
    policy = model.policy_parameters() if on else []
    for parameter in policy:
        parameter.requires_grad_(False)
        # With a gradient of zeros, as embeddings keep one, AdamW's momentum would still move it.
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in policy:
            parameter.requires_grad_(True)
