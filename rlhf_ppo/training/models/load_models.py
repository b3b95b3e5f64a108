"""Load policy, critic and reference, and check that they fit each other and compute what training needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.generation.engines import Sampler, choose_engine
from rlhf_ppo.models.acceleration.named_kernels import check_attention, check_kernels, is_flash, set_kernels
from rlhf_ppo.models.acceleration.working_copy import computing, hold_in_bf16, round_again
from rlhf_ppo.models.actor_critic import ActorCritic, CriticKind, build_actor_critic, choose_critic
from rlhf_ppo.models.adapters.lora import refuse_prompt_learning
from rlhf_ppo.models.adapters.policy_adapter import prepare_policy
from rlhf_ppo.models.adapters.quantization import check_precision, load_quantized, load_reference
from rlhf_ppo.models.compare import largest_kl, probe_logits, source_name
from rlhf_ppo.models.forward.forward_checks import check_backward, check_forward
from rlhf_ppo.models.frozen_critic import freeze_critic
from rlhf_ppo.models.loading import (
    BASE_FOLDER,
    REFERENCE_FOLDER,
    in_float32,
    load_config,
    load_policy,
    load_trunk,
    vocabulary_size,
)
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.models.sharded.deferred import Loader, simple_adapter
from rlhf_ppo.models.sharded.sharding import gathered
from rlhf_ppo.models.value_head import SavedHead, load_value_head
from rlhf_ppo.rewards.functions import RewardFunction
from rlhf_ppo.rewards.reward_model import RewardModel
from rlhf_ppo.runtime.processes.agreement import require_same
from rlhf_ppo.runtime.processes.group import ProcessGroup
from rlhf_ppo.runtime.seeding import seed_everything
from rlhf_ppo.training.checkpoints.fingerprints import parameters_fingerprint
from rlhf_ppo.training.models.fitted_critic import CriticFacts, find_fitted, require_same_trunk
from rlhf_ppo.training.models.shard_models import Plan, shard_models


class Models(NamedTuple):
    """What is trained and what stays frozen beside it."""

    actor_critic: ActorCritic
    reference: Reference
    base: str | None
    """The folder or hub id that holds the model under the policy's adapter; None: none does."""
    start: str | None
    """The folder or hub id that holds the reference; None: none does."""
    base_changed: bool
    """Adding the adapter changed the weights that it was added to."""
    plan: Plan
    """How the weights are spread over processes."""

    @property
    def reference_source(self) -> str:
        """Where the reference can be loaded from: a hub id or folder, or a folder inside the run's."""
        return self.start or (BASE_FOLDER if self.reference.model is None else REFERENCE_FOLDER)


class CriticStart(NamedTuple):
    """What the critic is, and what its value head starts from."""

    kind: CriticKind
    head: SavedHead | None
    """Loaded from ``value_head_from``."""
    fitted: CriticFacts | None
    """What that was fitted on, if ``critic fit`` made it."""


def check_models(
    args: RLHFConfig,
    model: Any,
    ref_model: Any,
    value_model: Any,
    peft_config: Any,
    device: torch.device,
    *,
    bf16: bool,
) -> None:
    """Raise an error unless the models, their adapters and the settings fit each other, and this machine."""
    check_kernels(args, device, bf16=bf16)
    vocab_size = vocabulary_size(load_config(model))
    if peft_config is not None and ref_model is not None:
        raise ValueError(
            "with peft_config the reference is the same model with its adapter off: drop ref_model, or merge what "
            "should be the reference into model"
        )
    if peft_config is not None:
        refuse_prompt_learning(peft_config, "peft_config")
    for name, config in getattr(model, "peft_config", {}).items():
        refuse_prompt_learning(config, f"model's adapter {name!r}")
    if peft_config is not None and hasattr(model, "peft_config"):
        raise ValueError(
            "model already has an adapter and peft_config asks for another: merge the first with "
            "model.merge_and_unload(), or drop peft_config to train the adapter that is there"
        )
    for name, other in (("ref_model", ref_model), ("value_model", value_model)):
        if other is not None and (size := vocabulary_size(load_config(other))) != vocab_size:
            raise ValueError(
                f"{name} has a vocabulary of {size} tokens and model one of {vocab_size}; they must read the same "
                "token ids, so use models of one tokenizer"
            )
    for name, given in (("model", model), ("ref_model", ref_model), ("value_model", value_model)):
        if given is not None:
            check_attention(args, name, given, AutoModel if name == "value_model" else AutoModelForCausalLM)
    check_precision(args, model, ref_model, peft_config, device)


def prepare_critic(args: RLHFConfig, model: Any, value_model: Any, peft_config: Any) -> CriticStart:
    """Choose the critic, and load the value head that it starts from."""
    has_adapter = peft_config is not None or hasattr(model, "peft_config")
    kind = choose_critic(args, value_model=value_model, has_adapter=has_adapter)
    fitted, source = find_fitted(args, kind, value_model, peft_config), args.value_head_from
    head = None if source is None else load_value_head(source, load_config(value_model or model))
    return CriticStart(kind, head, fitted)


def load_models(
    model: str | PreTrainedModel,
    ref_model: str | PreTrainedModel | None,
    value_model: str | PreTrainedModel | None,
    peft_config: Any,
    rewards: Mapping[str, tuple[RewardFunction, float]],
    args: RLHFConfig,
    device: torch.device,
    processes: ProcessGroup,
    *,
    bf16: bool,
    critic: CriticStart,
    plan: Plan,
) -> Models:
    """Load policy, critic and reference, and shard them; a model object that a reward also uses is copied."""
    seed_everything(args.seed)  # new heads and adapters start from random weights
    loader = Loader(defers=plan.sharding is not None and simple_adapter(peft_config))
    policy = _load_policy(loader, model, args, device, bf16=bf16)
    # One may train while another stays frozen, so a model object given for two of them is copied.
    judges = [getattr(function, "model", None) for function, _ in rewards.values()]
    value_model = _copy_if_shared(value_model, model, ref_model, *judges)
    ref_model = _copy_if_shared(ref_model, model)
    reference_model = _load_reference(loader, model, ref_model, peft_config, args, device, bf16=bf16)
    prepared = prepare_policy(policy, peft_config)
    policy = in_float32(prepared.policy, frozen=False)
    base = prepared.find_base(model)
    start = prepared.find_start(model, base)
    if ref_model is not None:
        start = ref_model if isinstance(ref_model, str) else None
    trunk = None if value_model is None else loader.load(AutoModel, value_model, load_trunk).requires_grad_(True)
    if trunk is not None:
        freeze_critic(trunk, args.critic_frozen)
    if not any(p.requires_grad for p in policy.parameters()):
        raise ValueError("the model has no trainable parameter; load its adapter with is_trainable=True")
    actor_critic = build_actor_critic(
        policy,
        critic.kind,
        trunk=trunk,
        head=critic.head,
        head_from=args.value_head_from,
        bare_base=not prepared.base_changed and (peft_config is not None or base is not None),
    )
    half = args.reference_format(bf16=bf16) == "bfloat16"
    reference = Reference(policy, reference_model, adapter_off=prepared.off_is_start, bf16=bf16, half=half)
    _prepare_rewards(rewards, plan, bf16=bf16)
    models = Models(actor_critic, reference, base, start, prepared.base_changed, plan)
    _place(models, args, device, loader)
    round_again(actor_critic, reference.root)  # model objects may have changed through .data since an earlier run
    _check_start(
        models, critic, args, bf16=bf16, source=source_name(model), own=ref_model is None, peft_config=peft_config
    )
    _require_same_weights(processes, models)
    _set_kernels(args, actor_critic, reference, [f.model for f, _ in rewards.values() if isinstance(f, RewardModel)])
    if bf16 and hasattr(policy, "peft_config") and isinstance(model, str):
        hold_in_bf16(policy)  # not the base of a model object, which stays as it was given
    return models


def _load_policy(loader: Loader, model: Any, args: RLHFConfig, device: torch.device, *, bf16: bool) -> Any:
    if args.quantization == "none":
        return loader.load(AutoModelForCausalLM, model, load_policy)
    return load_quantized(model, args.quantization, device=device, bf16=bf16)


def _prepare_rewards(rewards: Mapping[str, tuple[RewardFunction, float]], plan: Plan, *, bf16: bool) -> None:
    """Let reward models compute in the run's format, and share their weights out as the run does."""
    for function, _ in rewards.values():
        if isinstance(function, RewardModel):
            function.compute_in(bf16=bf16)
            if plan.sharding is not None:
                function.share(plan.sharding)


def _set_kernels(args: RLHFConfig, actor_critic: ActorCritic, reference: Reference, judges: Sequence[Any]) -> None:
    """Let all models use the attention and the kernels that the settings name."""
    for model, runner in (
        (actor_critic.policy, actor_critic.runner),
        (actor_critic.value_trunk, actor_critic.value_runner),
        (reference.model, reference.runner),
    ):
        if model is not None and runner is not None:
            set_kernels(model, args, runner, trains=model is not reference.model)
    for model in judges if not is_flash(args.attn_implementation) else ():
        set_kernels(model, args)


def _require_same_weights(processes: ProcessGroup, models: Models) -> None:
    """Compare the weights of processes that each hold all of them."""
    if not processes.alone and models.plan.sharding is None:
        weights = {"weights": parameters_fingerprint(models.actor_critic.named_parameters())}
        require_same(processes, "give all processes the same model", weights)


def _place(models: Models, args: RLHFConfig, device: torch.device, loader: Loader) -> None:
    """Move the models to the device, this process's shares of them where they are sharded."""
    actor_critic, reference, sharding = models.actor_critic, models.reference, models.plan.sharding
    if sharding is not None:
        shard_models(actor_critic, reference, sharding, args, loader.sources)
    actor_critic.to(device)
    if reference.model is not None:
        reference.model.to(device)


def _check_start(
    models: Models,
    critic: CriticStart,
    args: RLHFConfig,
    *,
    bf16: bool,
    source: str,
    own: bool,
    peft_config: Any,
) -> None:
    """Check that the critic was fitted on this policy, and that the reference (the policy's ``own``) equals it."""
    policy, low = models.actor_critic.policy, bf16 and models.plan.sharding is not None
    with computing(models.actor_critic, bf16=low):
        require_same_trunk(
            critic.fitted,
            models.actor_critic,
            source=source,
            exact=args.quantization == "none" and not low,
            base_changed=models.base_changed,
        )
    if own and args.reference_format(bf16=bf16) == ("bfloat16" if bf16 else "float32"):
        with gathered(models.actor_critic):
            _require_start(policy, models.reference, peft_config, bf16=bf16)


def _load_reference(
    loader: Loader,
    model: Any,
    ref_model: Any,
    peft_config: Any,
    args: RLHFConfig,
    device: torch.device,
    *,
    bf16: bool,
) -> Any:
    """Load a reference with weights of its own; None where a copy of the policy, or its adapter off, will do."""
    source, kind = model if ref_model is None else ref_model, args.reference_format(bf16=bf16)
    whole = partial(load_reference, model, ref_model, args, device, bf16=bf16)
    if peft_config is not None or kind not in ("float32", "bfloat16"):
        return whole()
    return loader.load(AutoModelForCausalLM, source, lambda _: whole(), getattr(torch, kind))


def check_passes(
    models: Models, args: RLHFConfig, engine: Sampler | None, *, prompts: Sequence[PromptSet], bf16: bool
) -> Sampler:
    """Check forward and backward passes, and return the engine that decodes this policy: ``engine``, if it is known.

    Args:
        prompts: what responses are sampled to; none where that is unknown, or a conversation, which grows by replies of
            unknown length.
    """
    longest = max((some.longest + args.max_new_tokens for some in prompts), default=None)
    check_forward(models.actor_critic, models.reference, longest=longest, bf16=bf16)
    check_backward(models.actor_critic, bf16=bf16, checkpoint=args.gradient_checkpointing)
    with computing(models.actor_critic, bf16=bf16):
        return engine or choose_engine(args, models.actor_critic)


def _require_start(policy: Any, reference: Reference, peft_config: Any, *, bf16: bool) -> None:
    """Check that policy and reference give a few tokens the same probabilities before the first update."""
    with reference.active():
        start = probe_logits(policy if reference.model is None else reference.model, bf16=bf16)
    if (gap := largest_kl(probe_logits(policy, bf16=bf16), start)) > 1e-4:
        raise ValueError(
            f"the reference is not the model that training starts from: {gap:.2g} nats a token apart before the first "
            f"update, with peft_config={peft_config}. Use another adapter, or a model that gives the same logits twice"
        )


def _copy_if_shared(model: Any, *others: Any) -> Any:
    return copy.deepcopy(model) if any(model is other and not isinstance(model, str) for other in others) else model
