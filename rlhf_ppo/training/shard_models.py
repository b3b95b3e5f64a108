"""Sharding in a run: decide by arithmetic whether its models are sharded, say why, and shard them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.config.run_groups import MemorySettings
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.deferred import Stored, named_sources, read_weights_held
from rlhf_ppo.models.loading import load_config
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.models.sharding import Sharding, gathered, keep_gathered, make_sharding, shard
from rlhf_ppo.models.skeleton import remember_skeleton
from rlhf_ppo.runtime.device import autocast
from rlhf_ppo.runtime.processes.group import ProcessGroup
from rlhf_ppo.runtime.processes.launch import read_launch

TRAINED_BYTES, FROZEN_BYTES = 16, 4
"""Bytes of a trained parameter (weight, gradient and AdamW's two moments, 4 each), and of a frozen one."""

USABLE = 0.8
"""Share of a device's memory for them; the rest is for activations and the decoding cache."""


class Plan(NamedTuple):
    """How a run's weights are spread over its processes."""

    sharding: Sharding | None
    """None: each process holds them all."""
    words: str
    """The same with the arithmetic, for the run's first lines."""
    decoding: str = "whole"
    """Under sharding, how weights are gathered for decoding: whole, or by layers."""


UNSHARDED = Plan(None, "")
"""The plan of a process that is alone."""


def plan_sharding(
    args: MemorySettings,
    model: Any,
    value_model: Any,
    *,
    adapter: bool,
    device: torch.device,
    bf16: bool,
    processes: ProcessGroup,
) -> Plan:
    """Decide how weights are spread.

    Args:
        args: ``sharding``, ``sharded_decoding`` and the reference's format.
        model, value_model: folders, hub ids or models.
        adapter: the policy's own weights are frozen, and the reference is the policy with its adapter off.
        device: this process's.
        bf16: layers compute in bfloat16.
        processes: those of the run.
    """
    if processes.alone:
        return UNSHARDED
    if args.quantization != "none":
        return Plan(None, f"{processes.size}, sharding=none: the quantised base is whole on each, with its adapter")
    size, memory = _count(load_config(model)), device_memory(device)
    critic = 0 if value_model is None else _count(load_config(value_model))
    reference = {"float32": 4, "bfloat16": 2, "8bit": 1, "4bit": 0.5}[args.reference_dtype]
    policy = size * (FROZEN_BYTES if adapter else TRAINED_BYTES + reference)
    needed = policy + critic * TRAINED_BYTES
    kept = f"{_gb(needed)} of weights, gradients and optimizer on each, of {_gb(memory)} memory"
    kind = args.sharding
    if kind == "auto":
        kind = "none" if needed <= USABLE * memory else "full"
    said = f"{processes.size}, sharding={kind}"
    if args.sharding == "auto":
        said += f" (auto: {kept}, {'at most' if kind == 'none' else 'above'} {USABLE:.0%})"
    if kind == "none":
        return Plan(None, f"{said}: each holds all weights")
    whole = size * (2 if bf16 else 4)
    decoding = args.sharded_decoding
    if decoding == "auto":
        decoding = "whole" if whole + needed / processes.size <= USABLE * memory else "layers"
    how = f"gathered whole for decoding ({_gb(whole)})" if decoding == "whole" else "decoding gathers layer by layer"
    quantized = "; the quantised reference stays whole on each" if "bit" in args.reference_dtype else ""

    def count(contributed: int) -> None:
        processes.bytes_exchanged += contributed

    sharding = make_sharding(hybrid=kind == "hybrid", device=device, bf16=bf16, count=count)
    return Plan(sharding, f"{said}: each holds its share of the weights; {how}{quantized}", decoding)


def shard_models(
    actor_critic: ActorCritic, reference: Reference, sharding: Sharding, args: RLHFConfig, sources: Mapping[int, Stored]
) -> None:
    """Shard policy with critic, and a reference with weights of its own, in place; then read deferred weights.

    Args:
        actor_critic, reference: the run's models.
        sharding: how.
        args: whether the loss reads the reference.
        sources: id of a parameter -> its values, where they are deferred.
    """
    _shard(actor_critic, sharding, sources)
    frozen = reference.model
    if frozen is None:
        reference.root = actor_critic
    elif not getattr(frozen, "is_quantized", False):
        _shard(frozen, sharding, sources)
        if args.kl_loss_coef > 0 and args.kl_loss == "exact":
            keep_gathered(frozen)  # the policy's backward pass reads its output layer
    if sources:
        with autocast(sharding.bf16, sharding.device), gathered(actor_critic), reference.active():
            for runner in (actor_critic.runner, actor_critic.value_runner, reference.runner):
                if runner is not None:
                    runner.find_shortcuts()


def _shard(model: nn.Module, sharding: Sharding, sources: Mapping[int, Stored]) -> None:
    named = named_sources(model, sources)
    remember_skeleton(model)
    shard(model, sharding)
    model.to(sharding.device)
    read_weights_held(model, named)


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory that this process may count on: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // read_launch().local_size


def _count(config: PretrainedConfig) -> int:
    """Count the parameters of a model, without making them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(p.numel() for p in model.parameters())


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
