"""Setup: check everything that can be wrong, cheapest first, then load the models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.chat import with_chat_template
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.data.rows import RowSource
from rlhf_ppo.generation.environments.episodes import Episodes, TextEnvironment, require_environment
from rlhf_ppo.generation.multi_turn import Respond
from rlhf_ppo.generation.rollout import SamplingParams
from rlhf_ppo.generation.stop_tokens import choose_stop_tokens
from rlhf_ppo.generation.tools.calls import Tools
from rlhf_ppo.generation.tools.schemas import Functions, Tool, tool_functions
from rlhf_ppo.models.acceleration.named_kernels import check_attention, is_flash
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.compare import source_name
from rlhf_ppo.models.loading import (
    load_config,
    load_tokenizer,
    prompt_room,
    resolve_model,
    vocabulary_size,
)
from rlhf_ppo.rewards.cache import make_caches
from rlhf_ppo.rewards.functions import RewardFunction, require_accepts_columns, reward_source
from rlhf_ppo.rewards.loading import RewardSource, check_servers, listed, load_judges, load_rewards, names_model
from rlhf_ppo.rewards.reward_model import RewardModel
from rlhf_ppo.runtime.logs.progress import Stopwatch
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.logs.trackers import require_installed
from rlhf_ppo.runtime.machine.device import compute_in_bf16, resolve_device
from rlhf_ppo.runtime.processes.group import ProcessGroup
from rlhf_ppo.runtime.processes.join import join_for
from rlhf_ppo.runtime.processes.launch import own_gpu
from rlhf_ppo.training.checkpoints.fingerprints import require_same_data
from rlhf_ppo.training.models.fitted_critic import require_same_task
from rlhf_ppo.training.models.learning_rates import resolve_learning_rates
from rlhf_ppo.training.models.load_models import CriticStart, check_models, check_passes, load_models, prepare_critic
from rlhf_ppo.training.models.shard_models import plan_sharding, run_setup
from rlhf_ppo.training.outside.connect import connect
from rlhf_ppo.training.recorded.recorded_rollouts import Recording
from rlhf_ppo.training.recorded.replayed_rollouts import open_replay, require_same_rewards
from rlhf_ppo.training.rollouts.turns import Partner, checked_partner, require_partner
from rlhf_ppo.training.run import Run


def set_up(
    model: str | PreTrainedModel,
    reward_funcs: RewardSource | Sequence[RewardSource] | None,
    args: RLHFConfig | None,
    *,
    train_dataset: RowSource | None,
    eval_dataset: RowSource | None,
    processing_class: PreTrainedTokenizerBase | None,
    ref_model: str | PreTrainedModel | None,
    value_model: str | PreTrainedModel | None,
    peft_config: Any,
    respond: Respond | None = None,
    environment: Callable[[], TextEnvironment] | None = None,
    judge_funcs: RewardSource | Sequence[RewardSource] = (),
    tools: Sequence[Tool] = (),
    trains: bool = True,
) -> tuple[Run, ActorCritic]:
    """Check and load all that a run needs; arguments and errors are those of :class:`rlhf_ppo.PPOTrainer`.

    Args:
        trains: False: the run samples and scores alone, which takes less memory.
    Returns:
        (what is fixed for the run, policy and critic).
    """
    args, processes, partner, device, bf16 = _join(args, eval_dataset, respond, environment, tools)
    sources = {"model": source_name(model), "ref_model": None if ref_model is None else source_name(ref_model)}
    model, ref_model, value_model = map(resolve_model, (model, ref_model, value_model))
    config, critic = _check_models(args, model, ref_model, value_model, peft_config, device, bf16)
    tokenizer = with_chat_template(processing_class or load_tokenizer(model), args.chat_template)
    room, sampling, recording = _responses(args, model, config, tokenizer)
    train_prompts, eval_prompts = _prompt_sets(train_dataset, eval_dataset, tokenizer, args, config, room, partner)
    sets, partner = _check_sets(processes, (train_prompts, eval_prompts), tokenizer, args, partner)
    rewards = _load_rewards(reward_funcs, args, device, sets, partner, tokenizer, recording, critic)
    judges = _load_judges(judge_funcs, reward_funcs, args, device, sets, conversations=partner is not None)
    engine = connect(args, model, peft_config, config, tokenizer, sets, sampling.stop_token_ids, bf16=bf16)
    given = (model, ref_model, value_model, peft_config, rewards, args, device, processes)
    setup = partial(run_setup, *given, bf16=bf16, critic=critic.kind, sets=sets, trains=trains)
    models = load_models(*given, bf16=bf16, critic=critic, plan=plan_sharding(setup, args, device, processes))
    args, learning_rates = resolve_learning_rates(args, models.actor_critic)
    return Run(
        args=args,
        learning_rates=learning_rates,
        device=device,
        bf16=bf16,
        tokenizer=tokenizer,
        room=room if engine is None else engine.room(room, args.max_new_tokens),
        train_prompts=train_prompts,
        eval_prompts=eval_prompts,
        rewards=rewards,
        judges=judges,
        score_caches=make_caches(rewards) if args.cache_rewards else {},
        respond=partner,
        reference=models.reference,
        base=models.base,
        start=models.start,
        sampling=sampling,
        sample=check_passes(models, args, engine, prompts=sets if partner is None else (), bf16=bf16),
        engine=engine,
        microbatch_tokens=args.microbatch_tokens or (1024 if device.type == "cpu" else 16384),
        folder=RunDirectory(args.output_dir, quiet=args.quiet, writes=processes.first),
        sources={**sources, "reference": models.reference_source},
        reward_sources=_reward_sources(reward_funcs),
        stopwatch=Stopwatch(device),
        recording=recording,
        processes=processes,
        plan=models.plan,
    ), models.actor_critic


def _join(
    args: Any, eval_dataset: RowSource | None, respond: Respond | None, environment: Any, tools: Sequence[Tool]
) -> tuple[RLHFConfig, ProcessGroup, Partner, torch.device, bool]:
    """Join the other processes, which must have the same settings; check these, and what answers the policy's turns.

    Returns:
        (settings of this process, the processes, what answers, where this one computes, whether in bfloat16).
    """
    if not isinstance(args, RLHFConfig):
        raise TypeError(f"args must be an RLHFConfig, got {type(args).__name__}: write RLHFConfig(output_dir=..., ...)")
    functions = tool_functions(tools)
    processes = join_for(args)
    args = _check_arguments(args, eval_dataset, respond, environment, functions, processes)
    partner = Tools(functions, respond) if functions else respond
    partner, device = partner if environment is None else Episodes(environment), own_gpu(resolve_device(args.device))
    return args, processes, partner, device, compute_in_bf16(args.precision, device)


def _check_models(
    args: RLHFConfig,
    model: str | PreTrainedModel,
    ref_model: str | PreTrainedModel | None,
    value_model: str | PreTrainedModel | None,
    peft_config: Any,
    device: torch.device,
    bf16: bool,
) -> tuple[PretrainedConfig, CriticStart]:
    """Check models before they are loaded, and choose the critic; returns the policy's configuration and that."""
    config = load_config(model)
    check_models(args, model, ref_model, value_model, peft_config, device, bf16=bf16)
    return config, prepare_critic(args, model, value_model, peft_config)


def _check_sets(
    processes: ProcessGroup,
    given: Sequence[PromptSet | None],
    tokenizer: PreTrainedTokenizerBase,
    args: RLHFConfig,
    partner: Partner,
) -> tuple[list[PromptSet], Partner]:
    """Return the sets that there are, and what answers turns; all processes must have the same.

    The chat template must be able to make turns of them.
    """
    sets = [prompts for prompts in given if prompts is not None]
    require_same_data(processes, {prompts.name: prompts for prompts in sets})
    return sets, checked_partner(partner, sets, tokenizer, args)


def _check_arguments(
    args: RLHFConfig,
    eval_dataset: RowSource | None,
    respond: Respond | None,
    environment: Any,
    functions: Functions,
    processes: ProcessGroup,
) -> RLHFConfig:
    """Check arguments against each other; returns the settings of this process, of which the first alone speaks."""
    require_installed(args.report_to)
    if environment is not None:
        require_environment(environment)
    require_partner(args, respond, environment, functions)
    if args.eval_every and eval_dataset is None:
        raise ValueError(
            f"eval_every={args.eval_every} has nothing to evaluate on: pass an eval_dataset, or set it to 0"
        )
    return args if processes.first else dataclasses.replace(args, quiet=True, report_to=())


def _prompt_sets(
    train_dataset: RowSource | None,
    eval_dataset: RowSource | None,
    tokenizer: PreTrainedTokenizerBase,
    args: RLHFConfig,
    config: PretrainedConfig,
    room: int | None,
    partner: Partner,
) -> list[PromptSet | None]:
    needs_prompts = not isinstance(partner, Episodes)
    given = {"tokenizer": tokenizer, "args": args, "vocab_size": vocabulary_size(config), "room": room}
    tools = partner.schemas if isinstance(partner, Tools) else []
    prompt_set = partial(PromptSet, **given, needs_prompts=needs_prompts, tools=tools)
    named = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    return [
        None if rows is None else prompt_set(rows, name=name, trains=name == "train_dataset")
        for name, rows in named.items()
    ]


def _responses(
    args: RLHFConfig, model: str | PreTrainedModel, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int | None, SamplingParams, Recording | None]:
    """Return the maximum prompt length in tokens, how responses are sampled, and those that are recorded already."""
    sampling = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        temperature=args.temperature,
        stop_token_ids=choose_stop_tokens(model, config, tokenizer, args, vocabulary_size(config)),
        stop_strings=args.stop_strings,
    )
    return prompt_room(config, args.max_new_tokens), sampling, open_replay(args, config, tokenizer)


def _load_rewards(
    reward_funcs: RewardSource | Sequence[RewardSource] | None,
    args: RLHFConfig,
    device: torch.device,
    sets: Sequence[PromptSet],
    partner: Partner,
    tokenizer: PreTrainedTokenizerBase,
    recording: Recording | None,
    critic: CriticStart,
) -> dict[str, tuple[RewardFunction, float]]:
    """Load the rewards, and check that they can judge these prompts' responses, and fit a replay or a fitted critic."""
    # The environment's reward comes first: its own weight, before those of the others.
    sources = [*([partner] if isinstance(partner, Episodes) else []), *listed(reward_funcs)]
    conversations = partner is not None
    for source in sources:
        if names_model(source) and not is_flash(args.attn_implementation):
            check_attention(args, f"reward {source_name(source)!r}", source, AutoModelForSequenceClassification)
    rewards = load_rewards(sources, args, device)
    require_same_rewards(recording, {name: weight for name, (_, weight) in rewards.items()})
    _check_rewards({name: function for name, (function, _) in rewards.items()}, sets, conversations=conversations)
    require_same_task(critic.fitted, args, tokenizer, rewards)
    return rewards


def _load_judges(
    judge_funcs: RewardSource | Sequence[RewardSource],
    reward_funcs: RewardSource | Sequence[RewardSource] | None,
    args: RLHFConfig,
    device: torch.device,
    sets: Sequence[PromptSet],
    *,
    conversations: bool,
) -> dict[str, RewardFunction]:
    """Load the judges, and check that they can judge responses to these prompts."""
    judges = load_judges(judge_funcs, reward_funcs, args, device)
    _check_rewards(judges, sets, conversations=conversations)
    return judges


def _check_rewards(rewards: Mapping[str, RewardFunction], sets: Sequence[PromptSet], *, conversations: bool) -> None:
    """Check that rewards, or judges, can be asked about responses to these prompts."""
    for prompts in sets:
        for name, function in rewards.items():
            require_accepts_columns(function, name, prompts.columns, prompts.name, conversations=conversations)
            if isinstance(function, RewardModel) and prompts.has_prompts:
                function.require_readable(prompts)
    if sets and sets[0].has_prompts:
        check_servers(rewards, sets[0], conversations=conversations)


def _reward_sources(reward_funcs: RewardSource | Sequence[RewardSource] | None) -> list[str]:
    """Return the names of the rewards for run.json."""
    return [reward_source(source) for source in listed(reward_funcs)]
