"""Setting up a run: everything that can be wrong is checked, cheapest first, before a model is loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.chat import refuse_prefill, with_chat_template
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.data.rows import RowSource
from rlhf_ppo.generation.engines import Sampler, choose_engine
from rlhf_ppo.generation.multi_turn import Respond
from rlhf_ppo.generation.reply_tokens import chat_reply_ids
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.compare import answers, kl
from rlhf_ppo.models.critics import build_actor_critic, choose_critic
from rlhf_ppo.models.forward_checks import probe, probe_gradient
from rlhf_ppo.models.loading import (
    adapter_base,
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
from rlhf_ppo.models.policy_adapter import make_adapter, without_new_adapter
from rlhf_ppo.models.quantization import check_precision, load_quantized, load_reference
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.models.value_head import read_head
from rlhf_ppo.rewards.cache import ScoreCache, make_caches
from rlhf_ppo.rewards.functions import RewardFunction, require_accepts_columns
from rlhf_ppo.rewards.loading import RewardSource, check_servers, load_rewards
from rlhf_ppo.rewards.reward_model import RewardModel
from rlhf_ppo.runtime.device import autocast, compute_in_bf16, resolve_device
from rlhf_ppo.runtime.processes import require_one_process
from rlhf_ppo.runtime.seeding import seed_everything
from rlhf_ppo.runtime.trackers import require_installed


@dataclass(frozen=True)
class RunParts:
    """What a run is made of, checked and loaded."""

    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    room: int | None
    """Most tokens a prompt may have beside max_new_tokens; None: the model sets no limit."""
    stop_token_ids: tuple[int, ...]
    train_prompts: PromptSet | None
    eval_prompts: PromptSet | None
    rewards: dict[str, tuple[RewardFunction, float]]
    """Name -> reward function and its weight."""
    score_caches: dict[str, ScoreCache]
    """Name -> what the reward function said so far; empty without cache_rewards."""
    model: ActorCritic
    reference: Reference
    bf16: bool
    """Matrix products run in bfloat16."""
    microbatch_tokens: int
    """Most tokens in one pass outside decoding."""
    sample: Sampler
    """The engine that decodes responses."""
    respond: Respond | None
    """Answers the policy's turns, or None where there is one turn."""
    base: str | None
    """The folder or hub id that holds the model under the policy's adapter; None: none does."""
    start: str | None
    """The folder or hub id that holds the reference; None: none does."""

    def batches(self, rollout: Rollout, rows: Sequence[int]) -> list[list[int]]:
        """``rows`` of a rollout in groups for one pass each."""
        return rollout.batches(rows, self.microbatch_tokens, padded=not self.model.reader.packs_on(self.device))


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
) -> RunParts:
    """Check and load the parts of a run; arguments and errors are those of :class:`rlhf_ppo.PPOTrainer`."""
    require_one_process()
    if not isinstance(args, RLHFConfig):
        raise TypeError(f"args must be an RLHFConfig, got {type(args).__name__}: write RLHFConfig(output_dir=..., ...)")
    require_installed(args.report_to)
    _check_respond(respond, args)
    if args.eval_every and eval_dataset is None:
        raise ValueError(
            f"eval_every={args.eval_every} has nothing to evaluate on: pass an eval_dataset, or set it to 0"
        )
    device = resolve_device(args.device)
    bf16 = compute_in_bf16(args.precision, device)
    model, ref_model, value_model = map(resolve_model, (model, ref_model, value_model))
    config = load_config(model)
    vocab_size = vocabulary_size(config)
    _check_models(model, ref_model, value_model, peft_config, vocab_size)
    check_precision(args, model, ref_model, peft_config, device)
    has_adapter = peft_config is not None or hasattr(model, "peft_config")
    critic = choose_critic(args, value_model=value_model, has_adapter=has_adapter)
    head = None
    if args.value_head_from is not None:
        trunk_config = config if value_model is None else load_config(value_model)
        head = read_head(args.value_head_from, trunk_config, setting="value_head_from")
    tokenizer = with_chat_template(processing_class or load_tokenizer(model), args.chat_template)
    room = prompt_room(config, args.max_new_tokens)
    stops = _stop_token_ids(model, config, tokenizer, args, vocab_size)

    def prompt_set(rows: RowSource | None, name: str) -> PromptSet | None:
        return None if rows is None else PromptSet(rows, tokenizer, args, vocab_size=vocab_size, room=room, name=name)

    train_prompts, eval_prompts = prompt_set(train_dataset, "train_dataset"), prompt_set(eval_dataset, "eval_dataset")
    if respond is not None:
        for prompts in filter(None, (train_prompts, eval_prompts)):
            _check_turns(tokenizer, prompts)
    rewards = load_rewards(reward_funcs, args, device)
    for prompts in filter(None, (train_prompts, eval_prompts)):
        for name, (function, _) in rewards.items():
            require_accepts_columns(function, name, prompts.columns, prompts.name, conversations=respond is not None)
            if isinstance(function, RewardModel):
                function.require_readable(prompts)
    if (asked := train_prompts or eval_prompts) is not None:
        check_servers(rewards, asked, conversations=respond is not None)
    caches = make_caches(rewards) if args.cache_rewards else {}
    seed_everything(args.seed)
    policy: Any
    if args.quantization == "none":
        policy = load_policy(model)
    else:
        policy = load_quantized(cast(str, model), args.quantization, device=device, bf16=bf16)
    # Each part trains, or stays frozen, by itself: a model object given for two of them is copied.
    judges = (getattr(function, "model", None) for function, _ in rewards.values())
    value_model = _copy_if_shared(value_model, model, ref_model, *judges)
    ref_model = _copy_if_shared(ref_model, model)
    reference_model = load_reference(model, ref_model, args, device, bf16=bf16)
    adapted = without_new_adapter(policy) if peft_config is None else make_adapter(policy, peft_config)
    policy = in_float32(adapted.policy, frozen=False)
    base = adapted.base(model)
    start = adapted.start(model, base)
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
        bare_base=not adapted.changed and (peft_config is not None or base is not None),
    )
    reference = Reference(policy, reference_model, adapter_off=adapted.off_is_start)
    actor_critic.to(device)
    if reference.model is not None:
        reference.model.to(device)
    sets = [prompts.longest for prompts in (train_prompts, eval_prompts) if prompts is not None]
    # A conversation grows by replies that nobody knows yet.
    longest = None if respond is not None or not sets else max(sets) + args.max_new_tokens
    if reference_model is None:
        _require_start(policy, reference, peft_config)
    probe(actor_critic, reference, longest=longest, bf16=bf16)
    probe_gradient(actor_critic, bf16=bf16, checkpoint=args.gradient_checkpointing)
    microbatch_tokens = args.microbatch_tokens or (1024 if device.type == "cpu" else 16384)
    with autocast(bf16, device):
        sample = choose_engine(args, actor_critic)
    return RunParts(
        device,
        tokenizer,
        room,
        stops,
        train_prompts,
        eval_prompts,
        rewards,
        caches,
        actor_critic,
        reference,
        bf16=bf16,
        microbatch_tokens=microbatch_tokens,
        sample=sample,
        respond=respond,
        base=base,
        start=start,
    )


def _require_start(policy: Any, reference: Reference, peft_config: Any) -> None:
    """Before the first update policy and reference must give the same few tokens the same probabilities."""
    with reference.active():
        start = answers(policy if reference.model is None else reference.model)
    if (gap := kl(answers(policy), start)) > 1e-4:
        raise ValueError(
            f"the reference is not the model that training starts from: {gap:.2g} nats a token apart before the first "
            f"update, with peft_config={peft_config}. Use another adapter, or a model that gives the same logits twice"
        )


def _check_respond(respond: Respond | None, args: RLHFConfig) -> None:
    if respond is None and args.max_turns > 1:
        raise ValueError(
            f"max_turns={args.max_turns} needs respond, which answers the policy's turns: pass respond=..., or set "
            "max_turns to 1"
        )
    if respond is not None and args.max_turns == 1:
        raise ValueError("respond is given, but max_turns=1 leaves no turn after its answer: raise max_turns")
    if respond is not None and not callable(respond):
        raise ValueError(f"respond must be a function of the messages, got {type(respond).__name__}")


def _check_turns(tokenizer: PreTrainedTokenizerBase, prompts: PromptSet) -> None:
    """A conversation must render by adding to its end, for each order of roles that there is, before any model work."""
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


def _stop_token_ids(
    model: str | PreTrainedModel,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    args: RLHFConfig,
    vocab_size: int,
) -> tuple[int, ...]:
    stops = stop_tokens(model, config, tokenizer) if args.stop_token_ids is None else args.stop_token_ids
    if not all(0 <= i < vocab_size for i in stops):
        raise ValueError(f"stop tokens {stops} must lie in the vocabulary [0, {vocab_size}): set stop_token_ids")
    if not stops and args.min_new_tokens:
        raise ValueError(
            f"min_new_tokens={args.min_new_tokens} holds back stop tokens, but model and tokenizer name none: set "
            "stop_token_ids, or min_new_tokens to 0"
        )
    if not stops and not args.stop_strings and args.missing_eos_penalty is not None:
        raise ValueError(
            f"missing_eos_penalty={args.missing_eos_penalty} needs a stop token, but model and tokenizer name none: "
            "set stop_token_ids"
        )
    if args.stop_token_ids is None:
        warn_of_unread_end(stops, tokenizer)
    return stops


def stop_tokens(
    model: str | PreTrainedModel, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """End-of-text ids from the model's generation config, else its config, else the tokenizer; () if none says."""
    named = (_generation_eos(model), config.get_text_config().eos_token_id, tokenizer.eos_token_id)
    found: Any = next((eos for eos in named if eos is not None), ())
    return (found,) if isinstance(found, int) else tuple(found)


def _generation_eos(model: str | PreTrainedModel) -> int | list[int] | None:
    if not isinstance(model, str):
        return None if model.generation_config is None else model.generation_config.eos_token_id
    try:
        return GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # a model need not bring a generation config
        base = adapter_base(model)
        return None if base is None else _generation_eos(resolve_model(base))


def warn_of_unread_end(stops: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if the token that the tokenizer calls end of text does not end a response."""
    end = tokenizer.eos_token_id
    if stops and end is not None and end not in stops:
        names = ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in stops)
        warnings.warn(
            f"responses stop at {names}, as the model's generation config says, but the tokenizer's end of text is "
            f"{end} ({tokenizer.eos_token!r}): a model that was taught to end with it never stops. Set stop_token_ids, "
            "or eos_token_id in generation_config.json",
            stacklevel=3,
        )
