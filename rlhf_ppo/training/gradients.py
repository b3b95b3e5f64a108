"""Gradients of one minibatch, accumulated over microbatches, clipped and applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import Experience, PolicyOutput, loss_denominator, ppo_diagnostics, ppo_loss
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.acceleration.activation_memory import offload_activations
from rlhf_ppo.models.acceleration.compiled_layers import compiled_layers
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.models.sharded.sharding import is_sharded, local_part, total_norm, whole_parameters
from rlhf_ppo.runtime.logs.metrics import MetricAverage
from rlhf_ppo.runtime.machine.transfers import indices_on
from rlhf_ppo.runtime.processes.group import ProcessGroup

MinibatchGradient = Callable[..., tuple[MetricAverage, dict[str, Tensor]]]
"""Has the signature of :func:`minibatch_gradient`."""


def minibatch_gradient(
    model: ActorCritic,
    rollout: Rollout,
    old: Experience,
    microbatches: Sequence[Sequence[int]],
    args: RLHFConfig,
    *,
    bf16: bool,
    reference: Reference | None,
    minibatch: Sequence[int] | None = None,
) -> tuple[MetricAverage, dict[str, Tensor]]:
    """Add the gradient of a minibatch's loss to ``.grad``; it is the same however the minibatch is split.

    Args:
        model: policy and critic.
        rollout: B responses.
        old: the recorded facts about them, [B, T].
        microbatches: the minibatch's rows, in groups for one forward and backward pass each; a pass over no rows adds
            zeros.
        args: the settings of this update.
        bf16: compute in bfloat16.
        reference: read where the loss has the exact KL to it.
        minibatch: all rows of the minibatch, where other processes hold some of them; the sums over processes are then
            the minibatch's.
    Returns:
        (diagnostics over the minibatch's actions, its losses [] by name: policy, value, kl and, where its weight is
        above 0, positive).
    """
    device = old.mask.device
    minibatch = _all_rows(microbatches) if minibatch is None else list(minibatch)
    whole = indices_on(device, minibatch)
    mask = old.mask[whole]
    denominator = loss_denominator(mask, args.loss_aggregation)
    positive = None if old.positive is None else loss_denominator(mask & old.positive[whole], args.loss_aggregation)
    exact_kl = args.kl_loss_coef > 0 and args.kl_loss == "exact"
    actions = MetricAverage()
    losses = {name: torch.zeros((), device=device) for name in ("policy", "value", "kl")}
    if args.positive_loss_coef > 0:
        losses["positive"] = torch.zeros((), device=device)
    for rows in microbatches:
        part, facts = _microbatch(rollout, old, rows)
        with _passes(model, bf16=bf16):
            with offload_activations(on=args.offload_activations):
                new = model(
                    *part,
                    temperature=args.temperature,
                    entropy=args.ent_coef > 0,
                    reference=reference.outputs(part) if exact_kl and reference is not None else None,
                )
            loss = ppo_loss(new, facts, args, denominator=denominator, positive_denominator=positive)
            loss.total.backward()
        actions.add(ppo_diagnostics(new, facts, args), weight=facts.mask.sum())
        losses["policy"] += loss.policy.detach()
        losses["value"] += loss.value.detach()
        losses["kl"] += loss.kl.detach()
        if args.positive_loss_coef > 0:
            losses["positive"] += loss.positive.detach()
    return actions, losses


def critic_gradient(
    model: ActorCritic,
    rollout: Rollout,
    old: Experience,
    microbatches: Sequence[Sequence[int]],
    args: RLHFConfig,
    *,
    bf16: bool,
    minibatch: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of a minibatch's value loss alone to ``.grad``, without a forward pass of the policy's output.

    Arguments are those of :func:`minibatch_gradient`.

    Returns:
        The minibatch's loss [] by name: value.
    """
    device = old.mask.device
    minibatch = _all_rows(microbatches) if minibatch is None else list(minibatch)
    denominator = loss_denominator(old.mask[indices_on(device, minibatch)], args.loss_aggregation)
    value = torch.zeros((), device=device)
    policy_off = {"ent_coef": 0.0, "kl_loss_coef": 0.0, "kl_loss": "k2"}
    alone = dataclasses.replace(args, **policy_off, positive_loss_coef=0.0, positive_score_above=0.0)
    for rows in microbatches:
        part, facts = _microbatch(rollout, old, rows)
        with _passes(model, bf16=bf16):
            with offload_activations(on=args.offload_activations):
                values = model.head_values(part)
            loss = ppo_loss(PolicyOutput(facts.logprobs, values), facts, alone, denominator=denominator)
            (args.vf_coef * loss.value).backward()
        value += loss.value.detach()
    return {"value": value}


@contextmanager
def _passes(model: ActorCritic, *, bf16: bool) -> Iterator[None]:
    """Let forward and backward passes inside run as the run's do."""
    with computing(model, bf16=bf16), accumulate_gradients(model), compiled_layers(model, on=bool(model.compiled)):
        yield


def _all_rows(microbatches: Sequence[Sequence[int]]) -> list[int]:
    return [row for rows in microbatches for row in rows]


def _microbatch(rollout: Rollout, old: Experience, rows: Sequence[int]) -> tuple[Sequences, Experience]:
    """Return some rows' tokens and recorded facts; for no rows those of the shortest response, which count nothing."""
    if not rows:
        shortest = min(range(len(rollout.token_counts)), key=lambda row: sum(rollout.token_counts[row]))
        part, facts = _microbatch(rollout, old, [shortest])
        return part, dataclasses.replace(facts, mask=torch.zeros_like(facts.mask))
    part = rollout.sequences(rows)
    return part, old[indices_on(old.mask.device, rows)][:, : part.mask.shape[1]]


def sum_over_processes(
    processes: ProcessGroup, model: nn.Module, actions: MetricAverage, losses: dict[str, Tensor]
) -> tuple[MetricAverage, dict[str, Tensor]]:
    """Add up the gradients, diagnostics and losses that the processes have for their shares of one optimizer step.

    Afterwards each process holds what one process would that had done all of the work. A process that had none has no
    gradients, and losses of 0.
    """
    if processes.alone:
        return actions, losses
    parameters = whole_parameters(model)  # FSDP has summed the others' gradients in the backward passes
    missing = [p for p in parameters if p.grad is None]
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float64)
    lost = torch.stack([x.to(torch.float64) for x in losses.values()])
    parts = [x.to(lost.device) for x in (present, lost, actions.packed())]
    present, summands, packed = processes.table(torch.cat(parts)).split([len(part) for part in parts], dim=1)
    if missing:
        # A layer that no row here has used (an expert) has a gradient elsewhere; one without any must stay without.
        for parameter, somewhere in zip(parameters, present.any(dim=0).tolist(), strict=True):
            if parameter.grad is None and somewhere:
                parameter.grad = torch.zeros_like(parameter)
    processes.add_up([p.grad for p in parameters if p.grad is not None])
    totals = {name: x.to(losses[name].dtype) for name, x in zip(losses, summands.sum(dim=0), strict=True)}
    return actions.combined(packed), totals


@contextmanager
def accumulate_gradients(model: nn.Module) -> Iterator[None]:
    """Let backward passes inside add up in ``.grad``; on exit every gradient is dense.

    An embedding's gradient is zero except in the rows that were looked up. On CPU only those rows are added, to the
    output layer's gradient (tied weights) or to one that stays allocated, instead of a [V, O] of zeros each time.
    A sharded model adds up its own.
    """
    if is_sharded(model):
        yield
        return
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    rows_only = [m for m in embeddings if m.weight.requires_grad and m.weight.device.type == "cpu" and not m.sparse]
    weights = [module.weight for module in rows_only]
    for module, weight in zip(rows_only, weights, strict=True):
        # A leaf of its own on the same memory: autograd copies a dense gradient before it adds rows to it.
        module.weight = nn.Parameter(weight.detach())
        module.sparse = True
    try:
        yield
    finally:
        for module, weight in zip(rows_only, weights, strict=True):
            rows, module.weight, module.sparse = module.weight.grad, weight, False
            if rows is None:
                continue
            rows = rows.to(weight.grad_dtype or weight.dtype)  # before those of one word are added up
            if weight.grad is None:
                weight.grad = rows.to_dense()
            else:
                weight.grad.add_(rows)


def clear_gradients(model: nn.Module) -> None:
    """Clear all gradients; those of embeddings that are not tied to an output layer stay allocated, as zeros."""
    modules = list(model.modules())
    heads = {id(module.weight) for module in modules if isinstance(module, nn.Linear)}
    kept = {id(m.weight) for m in modules if isinstance(m, nn.Embedding) and id(m.weight) not in heads}
    kept = set() if is_sharded(model) else kept
    for parameter in model.parameters():
        if parameter.grad is not None and id(parameter) in kept:
            parameter.grad.zero_()
        else:
            parameter.grad = None


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float
) -> tuple[Tensor, Tensor]:
    """Clip the gradient to a global norm and take an optimizer step; skip the step if the gradient is non-finite.

    The fused optimizer itself divides by ``grad_scale`` and skips under ``found_inf``: clipping costs no extra pass
    over the gradients, and nothing waits for the device.

    Args:
        optimizer: fused.
        parameters: those that it updates.
        max_norm: largest global norm.
    Returns:
        (norm before clipping [], whether it was finite [] bool).
    """
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    finite = torch.isfinite(norm)
    parts = [local_part(p) for p in parameters]
    fused: Any = optimizer
    fused.grad_scale = (norm / max_norm).clamp(min=1.0).float()
    fused.found_inf = (~finite).float()
    fused.step()
    for part, parameter in zip(parts, parameters, strict=True):
        if part is not parameter:
            part.grad = None
    return norm, finite
