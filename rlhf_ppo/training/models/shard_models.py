"""Sharding in a run: decide by arithmetic whether its models are sharded, say why, and shard them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from rlhf_ppo.config.arguments.plan import PlanArgs
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.actor_critic import ActorCritic, CriticKind
from rlhf_ppo.models.costs.cards import own_card
from rlhf_ppo.models.costs.choice import choose_sharding
from rlhf_ppo.models.costs.memory import peaks, usable
from rlhf_ppo.models.costs.setup import Adapter, Setup, lora_adapter
from rlhf_ppo.models.costs.shapes import Shape, rough_shape
from rlhf_ppo.models.costs.terms import total
from rlhf_ppo.models.costs.weights import gathered_weights
from rlhf_ppo.models.loading import load_config
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.models.sharded.deferred import Stored, named_sources, read_weights_held
from rlhf_ppo.models.sharded.sharding import Sharding, gathered, keep_gathered, make_sharding, shard
from rlhf_ppo.models.sharded.skeleton import remember_skeleton
from rlhf_ppo.rewards.functions import RewardFunction
from rlhf_ppo.rewards.reward_model import RewardModel
from rlhf_ppo.runtime.processes.group import ProcessGroup
from rlhf_ppo.runtime.processes.launch import read_launch


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


def run_setup(
    model: Any,
    ref_model: Any,
    value_model: Any,
    peft_config: Any,
    rewards: Mapping[str, tuple[RewardFunction, float]],
    args: RLHFConfig,
    device: torch.device,
    processes: ProcessGroup,
    *,
    bf16: bool,
    critic: CriticKind,
    sets: Sequence[PromptSet],
    trains: bool,
) -> Setup:
    """Describe a run as `rlhf-ppo plan` does, to choose by the same arithmetic how its weights are spread.

    Args:
        model, ref_model, value_model: folders, hub ids or models.
        peft_config: of the adapter, if it is not the model's own.
        rewards: reward models among them count.
        args: the run's settings.
        device: this process's.
        processes: those of the run.
        bf16: layers compute in bfloat16.
        critic: its kind.
        sets: prompts, of which the longest counts.
        trains: False for an evaluation.
    """
    policy = rough_shape(load_config(model))
    own = getattr(model, "peft_config", None)
    if peft_config is None and own:
        peft_config = next(iter(own.values()))
    judges = [function.model.config for function, _ in rewards.values() if isinstance(function, RewardModel)]
    return Setup(
        args=args,
        policy=policy,
        critic=critic,
        card=own_card(device),
        bf16=bf16,
        prompt_tokens=max((prompts.longest for prompts in sets), default=PlanArgs.prompt_tokens),
        response_tokens=args.max_new_tokens * args.max_turns,
        value=None if value_model is None else rough_shape(load_config(value_model), "critic"),
        rewards=tuple(rough_shape(config, "reward") for config in judges),
        adapter=None if peft_config is None else _adapter(policy, peft_config),
        reference=None if peft_config is not None else rough_shape(load_config(ref_model or model)),
        processes=processes.size,
        nodes=max(processes.size // read_launch().local_size, 1),
        trains=trains,
    )


def _adapter(policy: Shape, config: Any) -> Adapter:
    """Return the size of an adapter; of a kind that is not counted, that of LoRA on all layers."""
    rank, names = int(getattr(config, "r", 8)), getattr(config, "target_modules", None)
    try:
        return lora_adapter(policy, rank, (names,) if isinstance(names, str) else names and tuple(names))
    except ValueError:
        return Adapter(rank, policy.linears, policy.layers)


def plan_sharding(
    find_setup: Callable[[], Setup], args: RLHFConfig, device: torch.device, processes: ProcessGroup
) -> Plan:
    """Decide how weights are spread.

    Args:
        find_setup: describes the run; called where there is something to decide.
        args: the run's settings.
        device: this process's.
        processes: those of the run.
    Raises:
        ValueError: the weights are to be shared out, and settings ask for what needs them whole.
    """
    if processes.alone:
        return UNSHARDED
    if args.quantization != "none":
        return Plan(None, f"{processes.size}, sharding=none: the quantised base is whole on each, with its adapter")
    setup = find_setup()
    chosen, needed = choose_sharding(setup), peaks(replace(setup, sharding="none"))
    said = f"{processes.size}, sharding={chosen.sharding}"
    if args.sharding == "auto":
        most = max(needed, key=lambda phase: needed[phase])
        said += f" (auto: with all weights on each, {most} takes {_gb(needed[most])} of {_gb(usable(setup))})"
    if chosen.sharding == "none":
        return Plan(None, f"{said}: each holds all weights")
    if args.compile == "always":
        raise ValueError(
            f"compile='always' needs all weights on each process, but sharding={args.sharding!r} shares them out here: "
            "set compile='never' or sharding='none'"
        )
    whole = _gb(total(gathered_weights(chosen, setup.policy, whole=True)))
    how = f"gathered whole for decoding ({whole})" if chosen.gathers_whole else "decoding gathers layer by layer"
    quantized = "; the quantised reference stays whole on each" if "bit" in args.reference_dtype else ""
    hybrid, count = chosen.sharding == "hybrid", processes.note_traffic
    sharding = make_sharding(hybrid=hybrid, device=device, bf16=setup.bf16, count=count)
    decoding = "whole" if chosen.gathers_whole else "layers"
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
        with computing(actor_critic, bf16=sharding.bf16), gathered(actor_critic), reference.active():
            for runner in (actor_critic.runner, actor_critic.value_runner, reference.runner):
                if runner is not None:
                    runner.find_shortcuts()


def _shard(model: nn.Module, sharding: Sharding, sources: Mapping[int, Stored]) -> None:
    named = named_sources(model, sources)
    remember_skeleton(model)
    shard(model, sharding)
    model.to(sharding.device)
    read_weights_held(model, named)


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
