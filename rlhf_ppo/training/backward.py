"""Backward: the gradient of one minibatch, in passes of bounded size; it is the same however the minibatch is split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import Experience, loss_denominator, ppo_diagnostics, ppo_loss
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.activation_memory import offload_activations
from rlhf_ppo.models.actor_critic import ActorCritic, Reference
from rlhf_ppo.runtime.device import autocast
from rlhf_ppo.runtime.metrics import MetricAverage
from rlhf_ppo.training.gradients import accumulate_gradients


def minibatch_gradient(
    model: ActorCritic,
    rollout: Rollout,
    old: Experience,
    passes: Sequence[Sequence[int]],
    objective: RLHFConfig,
    *,
    bf16: bool,
    reference: Reference | None,
) -> tuple[MetricAverage, dict[str, Tensor]]:
    """Add the gradient of a minibatch's loss to ``.grad``.

    Args:
        model: policy and critic.
        rollout: B responses.
        old: the recorded facts about them, [B, T].
        passes: the minibatch's rows, in groups for one pass each.
        objective: the settings in force.
        bf16: compute in bfloat16.
        reference: for the exact KL to it as a loss (otherwise None).
    Returns:
        (diagnostics over the minibatch's actions, its losses [] by name: policy, value, kl).
    """
    device = old.mask.device
    minibatch = [row for rows in passes for row in rows]
    denominator = loss_denominator(old.mask[minibatch], objective.loss_aggregation)
    actions = MetricAverage()
    losses = {name: torch.zeros((), device=device) for name in ("policy", "value", "kl")}
    for rows in passes:
        part = rollout.sequences(rows)
        facts = old[list(rows)][:, : part.mask.shape[1]]
        with accumulate_gradients(model):
            with offload_activations(on=objective.offload_activations), autocast(bf16, device):
                new = model(
                    *part,
                    temperature=objective.temperature,
                    entropy=objective.ent_coef > 0,
                    reference=None if reference is None else reference.outputs(part),
                )
            loss = ppo_loss(new, facts, objective, denominator=denominator)
            loss.total.backward()
        actions.add(ppo_diagnostics(new, facts, objective), weight=facts.mask.sum())
        losses["policy"] += loss.policy.detach()
        losses["value"] += loss.value.detach()
        losses["kl"] += loss.kl.detach()
    return actions, losses
