"""Setup: check everything that can be wrong, cheapest first, then load the models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ppo.config.groups import CriticSettings, RolloutSettings
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.chat import refuse_prefill, with_chat_template
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.data.rows import RowSource
from rlhf_ppo.generation.engines import Sampler, choose_engine
from rlhf_ppo.generation.multi_turn import Respond
from rlhf_ppo.generation.reply_tokens import chat_reply_ids
from rlhf_ppo.generation.rollout import SamplingParams
from rlhf_ppo.generation.stop_tokens import choose_stop_tokens
from rlhf_ppo.models.actor_critic import ActorCritic, CriticKind, build_actor_critic, choose_critic
from rlhf_ppo.models.compare import largest_kl, probe_logits, source_name
from rlhf_ppo.models.forward_checks import check_backward, check_forward
from rlhf_ppo.models.loading import (
    BASE_FOLDER,
    REFERENCE_FOLDER,
    in_float32,
    load_config,
    load_policy,
    load_tokenizer,
    load_trunk,
    prompt_room,
    resolve_model,
    vocabulary_size,
)
from rlhf_ppo.models.lora import refuse_prompt_learning
from rlhf_ppo.models.policy_adapter import prepare_policy
from rlhf_ppo.models.quantization import check_precision, load_quantized, load_reference
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.models.value_head import load_value_head
from rlhf_ppo.rewards.cache import make_caches
from rlhf_ppo.rewards.functions import RewardFunction, require_accepts_columns, reward_source
from rlhf_ppo.rewards.loading import RewardSource, check_servers, load_rewards
from rlhf_ppo.rewards.reward_model import RewardModel
from rlhf_ppo.runtime.device import autocast, compute_in_bf16, resolve_device
from rlhf_ppo.runtime.processes import require_one_process
from rlhf_ppo.runtime.progress import Stopwatch
from rlhf_ppo.runtime.run_directory import RunDirectory
from rlhf_ppo.runtime.seeding import seed_everything
from rlhf_ppo.runtime.trackers import require_installed
from rlhf_ppo.training.run import Run


class _Models(NamedTuple):
    """What is trained and what stays frozen beside it."""

    actor_critic: ActorCritic
    reference: Reference
    base: str | None
    """The folder or hub id that holds the model under the policy's adapter; None: none does."""
    start: str | None
    """The folder or hub id that holds the reference; None: none does."""


def set_up(
    model: str | PreTrainedModel,
    reward_funcs: RewardSource | Sequence[RewardSource],
    args: RLHFConfig,
    *,
    train_dataset: RowSource | None,
    eval_dataset: RowSource | None,
    processing_class: PreTrainedTokenizerBase | None,
    ref_model: str | PreTrainedModel | None,
    value_model: str | PreTrainedModel | None,
    peft_config: Any,
    respond: Respond | None = None,
) -> tuple[Run, ActorCritic]:
    """Check and load all that a run needs; arguments and errors are those of :class:`rlhf_ppo.PPOTrainer`.

    Returns:
        (what is fixed for the run, policy and critic).
    """
    _check_arguments(args, eval_dataset, respond)
    sources = {"model": source_name(model), "ref_model": None if ref_model is None else source_name(ref_model)}
    device = resolve_device(args.device)
    bf16 = compute_in_bf16(args.precision, device)
    model, ref_model, value_model = map(resolve_model, (model, ref_model, value_model))
    config = load_config(model)
    vocab_size = vocabulary_size(config)
    _check_models(model, ref_model, value_model, peft_config, vocab_size)
    check_precision(args, model, ref_model, peft_config, device)
    has_adapter = peft_config is not None or hasattr(model, "peft_config")
    critic = choose_critic(args, value_model=value_model, has_adapter=has_adapter)
    head = _load_value_head(args, value_model or model)
    tokenizer = with_chat_template(processing_class or load_tokenizer(model), args.chat_template)
    room = prompt_room(config, args.max_new_tokens)
    stops = choose_stop_tokens(model, config, tokenizer, args, vocab_size)
    train_prompts, eval_prompts = (
        None if rows is None else PromptSet(rows, tokenizer, args, vocab_size=vocab_size, room=room, name=name)
        for rows, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset"))
    )
    sets = [prompts for prompts in (train_prompts, eval_prompts) if prompts is not None]
    if respond is not None:
        _check_turns(tokenizer, sets)
    rewards = _load_rewards(reward_funcs, args, device, sets, conversations=respond is not None)
    caches = make_caches(rewards) if args.cache_rewards else {}
    seed_everything(args.seed)
    judges = [getattr(function, "model", None) for function, _ in rewards.values()]
    models = _load_models(
        model, ref_model, value_model, peft_config, args, device, bf16=bf16, critic=critic, head=head, judges=judges
    )
    # A conversation grows by replies of unknown length.
    longest = None if respond is not None or not sets else max(p.longest for p in sets) + args.max_new_tokens
    sample = _check_passes(models, args, device, longest=longest, bf16=bf16)
    sources["reference"] = models.start or (BASE_FOLDER if models.reference.model is None else REFERENCE_FOLDER)
    run = Run(
        args=args,
        device=device,
        bf16=bf16,
        tokenizer=tokenizer,
        room=room,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts,
        rewards=rewards,
        score_caches=caches,
        respond=respond,
        reference=models.reference,
        base=models.base,
        start=models.start,
        sampling=_sampling_params(args, stops),
        sample=sample,
        microbatch_tokens=args.microbatch_tokens or (1024 if device.type == "cpu" else 16384),
        folder=RunDirectory(args.output_dir, quiet=args.quiet),
        sources=sources,
        reward_sources=_reward_sources(reward_funcs),
        stopwatch=Stopwatch(device),
    )
    return run, models.actor_critic


def _check_arguments(args: RLHFConfig, eval_dataset: RowSource | None, respond: Respond | None) -> None:
    require_one_process()
    if not isinstance(args, RLHFConfig):
        raise TypeError(f"args must be an RLHFConfig, got {type(args).__name__}: write RLHFConfig(output_dir=..., ...)")
    require_installed(args.report_to)
    if respond is None and args.max_turns > 1:
        raise ValueError(
            f"max_turns={args.max_turns} needs respond, which answers the policy's turns: pass respond=..., or set "
            "max_turns to 1"
        )
    if respond is not None and args.max_turns == 1:
        raise ValueError("respond is given, but max_turns=1 leaves no turn after its answer: raise max_turns")
    if respond is not None and not callable(respond):
        raise ValueError(f"respond must be a function of the messages, got {type(respond).__name__}")
    if args.eval_every and eval_dataset is None:
        raise ValueError(
            f"eval_every={args.eval_every} has nothing to evaluate on: pass an eval_dataset, or set it to 0"
        )


def _load_value_head(args: CriticSettings, trunk: str | PreTrainedModel) -> dict[str, Tensor] | None:
    if args.value_head_from is None:
        return None
    return load_value_head(args.value_head_from, load_config(trunk), setting="value_head_from")


def _sampling_params(args: RolloutSettings, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        temperature=args.temperature,
        stop_token_ids=stop_token_ids,
        stop_strings=args.stop_strings,
    )


def _load_rewards(
    reward_funcs: RewardSource | Sequence[RewardSource],
    args: RLHFConfig,
    device: torch.device,
    sets: Sequence[PromptSet],
    *,
    conversations: bool,
) -> dict[str, tuple[RewardFunction, float]]:
    """Load the rewards, and check that they can judge responses to these prompts."""
    rewards = load_rewards(reward_funcs, args, device)
    for prompts in sets:
        for name, (function, _) in rewards.items():
            require_accepts_columns(function, name, prompts.columns, prompts.name, conversations=conversations)
            if isinstance(function, RewardModel):
                function.require_readable(prompts)
    if sets:
        check_servers(rewards, sets[0], conversations=conversations)
    return rewards


def _load_models(
    model: str | PreTrainedModel,
    ref_model: str | PreTrainedModel | None,
    value_model: str | PreTrainedModel | None,
    peft_config: Any,
    args: RLHFConfig,
    device: torch.device,
    *,
    bf16: bool,
    critic: CriticKind,
    head: dict[str, Tensor] | None,
    judges: Sequence[Any],
) -> _Models:
    """Load policy, critic and reference; a model that ``judges`` hold, too, is copied."""
    policy: Any
    if args.quantization == "none":
        policy = load_policy(model)
    else:
        policy = load_quantized(cast(str, model), args.quantization, device=device, bf16=bf16)
    # Each part trains, or stays frozen, by itself: a model object given for two of them is copied.
    value_model = _copy_if_shared(value_model, model, ref_model, *judges)
    ref_model = _copy_if_shared(ref_model, model)
    reference_model = load_reference(model, ref_model, args, device, bf16=bf16)
    prepared = prepare_policy(policy, peft_config)
    policy = in_float32(prepared.policy, frozen=False)
    base = prepared.find_base(model)
    start = prepared.find_start(model, base)
    if ref_model is not None:
        start = ref_model if isinstance(ref_model, str) else None
    trunk = None if value_model is None else load_trunk(value_model).requires_grad_(True)
    if not any(p.requires_grad for p in policy.parameters()):
        raise ValueError("the model has no trainable parameter; load its adapter with is_trainable=True")
    actor_critic = build_actor_critic(
        policy,
        critic,
        trunk=trunk,
        head=head,
        head_from=args.value_head_from,
        bare_base=not prepared.base_changed and (peft_config is not None or base is not None),
    )
    reference = Reference(policy, reference_model, adapter_off=prepared.off_is_start)
    actor_critic.to(device)
    if reference.model is not None:
        reference.model.to(device)
    if reference_model is None:
        _require_start(policy, reference, peft_config)
    return _Models(actor_critic, reference, base, start)


def _check_passes(
    models: _Models, args: RLHFConfig, device: torch.device, *, longest: int | None, bf16: bool
) -> Sampler:
    """Check forward and backward passes, and return the engine that decodes this policy."""
    check_forward(models.actor_critic, models.reference, longest=longest, bf16=bf16)
    check_backward(models.actor_critic, bf16=bf16, checkpoint=args.gradient_checkpointing)
    with autocast(bf16, device):
        return choose_engine(args, models.actor_critic)


def _reward_sources(reward_funcs: RewardSource | Sequence[RewardSource]) -> list[str]:
    listed = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    return [reward_source(source) for source in listed]


def _require_start(policy: Any, reference: Reference, peft_config: Any) -> None:
    """Check that policy and reference give a few tokens the same probabilities before the first update."""
    with reference.active():
        start = probe_logits(policy if reference.model is None else reference.model)
    if (gap := largest_kl(probe_logits(policy), start)) > 1e-4:
        raise ValueError(
            f"the reference is not the model that training starts from: {gap:.2g} nats a token apart before the first "
            f"update, with peft_config={peft_config}. Use another adapter, or a model that gives the same logits twice"
        )


def _check_turns(tokenizer: PreTrainedTokenizerBase, sets: Sequence[PromptSet]) -> None:
    """Check, for each order of roles in the prompts, that the chat template renders a reply by appending text."""
    for prompts in sets:
        seen: set[tuple[str, ...]] = set()
        for prompt, where in zip(prompts.rows["prompt"], prompts.rows.names, strict=True):
            if isinstance(prompt, str) or (roles := tuple(message["role"] for message in prompt)) in seen:
                continue
            seen.add(roles)
            refuse_prefill(prompt, where)
            chat_reply_ids(tokenizer, [*prompt, {"role": "assistant", "content": ""}], "and then?", None, where)


def _copy_if_shared(model: Any, *others: Any) -> Any:
    return copy.deepcopy(model) if any(model is other and not isinstance(model, str) for other in others) else model


def _check_models(model: Any, ref_model: Any, value_model: Any, peft_config: Any, vocab_size: int) -> None:
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
