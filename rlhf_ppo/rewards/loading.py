"""Rewards: functions, reward models and servers, by object or by name, behind one signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from transformers import PreTrainedModel

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core.validation import is_changed
from rlhf_ppo.data.chat import Completion
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.rewards.cache import ScoreCache
from rlhf_ppo.rewards.functions import RewardError, RewardFunction, StepRewards, reward_name, takes
from rlhf_ppo.rewards.http_client import HTTPReward
from rlhf_ppo.rewards.reward_model import RewardModel
from rlhf_ppo.rewards.scoring import coerce_scores, score
from rlhf_ppo.runtime.user_code import load_function

__all__ = [
    "HTTPReward",
    "RewardError",
    "RewardFunction",
    "RewardModel",
    "RewardSource",
    "StepRewards",
    "ask_servers",
    "coerce_scores",
    "load_reward",
    "load_rewards",
    "make_caches",
    "reward_name",
    "score",
]

RewardSource = RewardFunction | str | PreTrainedModel


def load_reward(
    source: RewardSource,
    *,
    device: torch.device | str,
    chat_template: str | None = None,
    max_length: int | None = None,
    http_timeout_s: float = 60.0,
    http_retries: int = 3,
    http_batch_size: int = 64,
    http_concurrency: int = 4,
) -> RewardFunction:
    """A reward function from a callable, a model, an address or a name.

    Args:
        source: function, model, ``file.py:function``, ``module:function``, ``http(s)://...``, folder or hub id.
        device: where reward models are loaded.
        chat_template, max_length: for reward models, see :class:`rlhf_ppo.RewardModel`.
        http_timeout_s, http_retries, http_batch_size, http_concurrency: for addresses, see
            :class:`rlhf_ppo.rewards.http_client.HTTPReward`.
    Raises:
        ValueError: the file, module or function is not there, the model does not fit (see
            :class:`rlhf_ppo.RewardModel`), or the address is none.
    """
    if isinstance(source, type):
        raise ValueError(f"reward {source.__name__} is a class: pass one of its instances, {source.__name__}(...)")
    if callable(source) and not isinstance(source, PreTrainedModel):
        return source
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return HTTPReward(
            source,
            timeout_s=http_timeout_s,
            max_retries=http_retries,
            batch_size=http_batch_size,
            concurrency=http_concurrency,
        )
    if isinstance(source, str) and source.endswith(".py"):
        raise ValueError(f"reward {source!r} names a file but no function: write {source}:function")
    if isinstance(source, PreTrainedModel) or (isinstance(source, str) and ":" not in source):
        return RewardModel(source, device=device, chat_template=chat_template, max_length=max_length)
    if not isinstance(source, str):
        raise ValueError(
            f"a reward must be a function, a model, a folder, a hub id or an address, got {type(source).__name__}"
        )
    return load_function(source, "reward")


def ask_servers(rewards: dict[str, tuple[RewardFunction, float]], prompts: PromptSet, *, conversations: bool) -> None:
    """Ask each reward server about an empty answer to the first prompt, before models are loaded.

    Raises:
        ValueError: it is not to be reached, refuses, or answers something else than one score.
    """
    batch = prompts.take([0])
    said: Completion = ""
    if conversations and not isinstance(batch.prompts[0], str):
        said = [{"role": "assistant", "content": ""}]
    for name, (function, _) in rewards.items():
        if isinstance(function, HTTPReward):
            try:
                coerce_scores(function(batch.prompts, [said], **batch.columns), 1, name, [0])
            except RewardError as error:
                raise ValueError(f"{error}. Start the server or correct the address; nothing was generated") from None


def make_caches(rewards: dict[str, tuple[RewardFunction, float]]) -> dict[str, ScoreCache]:
    """A cache for each reward function whose answer may be kept (``cache_rewards``); ValueError: there is none."""
    # Who asks for conversations may know more about them than their text, such as an environment's state.
    kept = [
        name for name, (f, _) in rewards.items() if not takes(f, "conversations") and not takes(f, "completion_turns")
    ]
    if not kept:
        raise ValueError(
            f"cache_rewards=True has no effect: all of the rewards {list(rewards)} ask for conversations or "
            "completion_turns, about which they may know more than their text says. Leave it out"
        )
    return {name: ScoreCache() for name in kept}


def load_rewards(
    reward_funcs: RewardSource | Sequence[RewardSource], args: RLHFConfig, device: torch.device
) -> dict[str, tuple[RewardFunction, float]]:
    """Name -> reward function and its weight, of one source or several.

    Raises:
        ValueError: see :func:`load_reward`; weights that do not fit, or settings that none of the rewards reads.
    """
    sources = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [cast(RewardSource, reward_funcs)]
    if not sources:
        raise ValueError("reward_funcs is empty: give at least one reward function or model")
    weights = args.reward_weights or (1.0,) * len(sources)
    if len(weights) != len(sources):
        raise ValueError(f"reward_weights has {len(weights)} weights for {len(sources)} reward functions")
    rewards: dict[str, tuple[RewardFunction, float]] = {}
    loaded_here = served = False
    for source, weight in zip(sources, weights, strict=True):
        function = load_reward(
            source,
            device=device,
            chat_template=args.reward_chat_template,
            max_length=args.reward_max_length,
            http_timeout_s=args.http_timeout_s,
            http_retries=args.http_retries,
            http_batch_size=args.http_batch_size,
            http_concurrency=args.http_concurrency,
        )
        loaded_here |= isinstance(function, RewardModel) and function is not source
        served |= isinstance(function, HTTPReward) and function is not source
        name = reward_name(function)
        if name in rewards:
            name = f"{name}_{len(rewards) + 1}"
        rewards[name] = (function, weight)
    by_name = {
        "reward models loaded by name": (("reward_chat_template", "reward_max_length"), loaded_here),
        "reward servers given by address": (
            ("http_timeout_s", "http_retries", "http_batch_size", "http_concurrency"),
            served,
        ),
    }
    for what, (settings, there) in by_name.items():
        for setting in settings:
            if not there and is_changed(args, setting):
                raise ValueError(
                    f"{setting}={getattr(args, setting)!r} is for {what}, but none of the rewards {list(rewards)} is "
                    "one: leave it out, or give it to RewardModel(...) or HTTPReward(...)"
                )
    return rewards
