"""Load rewards: a function, reward model or server, given as an object or by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from rlhf_ppo.config.groups import RewardSettings
from rlhf_ppo.core.validation import is_changed
from rlhf_ppo.data.chat import Completion
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.rewards.functions import RewardFunction, reward_name, reward_source
from rlhf_ppo.rewards.http_client import HTTPReward
from rlhf_ppo.rewards.reward_model import RewardModel
from rlhf_ppo.rewards.validation import RewardError, coerce_scores
from rlhf_ppo.runtime.command_line.user_code import load_function

__all__ = ["RewardSource", "check_servers", "load_reward", "load_rewards", "reward_name"]

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
    """Load a reward function from a callable, a model, an address or a name.

    Args:
        source: function, model, ``file.py:function``, ``module:function``, ``http(s)://...``, folder or hub id.
        device: where reward models are loaded.
        chat_template, max_length: for reward models, see :class:`rlhf_ppo.RewardModel`.
        http_timeout_s, http_retries, http_batch_size, http_concurrency: for addresses, see
            :class:`rlhf_ppo.rewards.http_client.HTTPReward`.
    Raises:
        ValueError: no such file, module or function, an invalid address, or a model that is not a reward model (see
            :class:`rlhf_ppo.RewardModel`).
    """
    if isinstance(source, type):
        raise ValueError(f"reward {source.__name__} is a class: pass one of its instances, {source.__name__}(...)")
    if callable(source) and not isinstance(source, PreTrainedModel):
        return _with_packages(source)
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
    if names_model(source):
        return RewardModel(source, device=device, chat_template=chat_template, max_length=max_length)
    if not isinstance(source, str):
        raise ValueError(
            f"a reward must be a function, a model, a folder, a hub id or an address, got {type(source).__name__}"
        )
    return _with_packages(load_function(source, "reward"))


def _with_packages(function: RewardFunction) -> RewardFunction:
    """Return a reward function, whose attribute ``needs`` may name a package and the extra that brings it.

    Raises:
        ModuleNotFoundError: the package is missing; says how to install it.
    """
    package, extra = getattr(function, "needs", (None, None))
    if package is not None and find_spec(package) is None:
        raise ModuleNotFoundError(
            f"reward {reward_name(function)!r} needs a missing package: pip install 'rlhf-ppo[{extra}]'"
        )
    return function


def names_model(source: object) -> bool:
    """Return whether a reward is a model: one that is loaded, or the name of one."""
    return isinstance(source, PreTrainedModel) or (
        isinstance(source, str) and ":" not in source and not source.endswith(".py")
    )


def listed(reward_funcs: RewardSource | Sequence[RewardSource] | None) -> list[RewardSource]:
    """Return one or several rewards, or none, as a list."""
    if reward_funcs is None:
        return []
    return list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [cast(RewardSource, reward_funcs)]


def load_rewards(
    reward_funcs: RewardSource | Sequence[RewardSource], args: RewardSettings, device: torch.device
) -> dict[str, tuple[RewardFunction, float]]:
    """Load one or several rewards: name -> function and its weight.

    Raises:
        ValueError: see :func:`load_reward`; the wrong number of weights, or settings that none of the rewards reads.
    """
    sources = listed(reward_funcs)
    if not sources:
        raise ValueError("reward_funcs is empty: give at least one reward function or model, or an environment")
    weights = args.reward_weights or (1.0,) * len(sources)
    if len(weights) != len(sources):
        raise ValueError(f"reward_weights has {len(weights)} weights for {len(sources)} reward functions")
    rewards: dict[str, tuple[RewardFunction, float]] = {}
    any_model = any_server = False
    for source, weight in zip(sources, weights, strict=True):
        function = _load(source, args, device)
        any_model |= isinstance(function, RewardModel) and function is not source
        any_server |= isinstance(function, HTTPReward) and function is not source
        rewards[_new_name(function, rewards)] = (function, weight)
    models, servers = "reward models loaded by name", "reward servers given by address"
    _refuse_unread(args, rewards, models, any_model, "reward_chat_template", "reward_max_length")
    http = ("http_timeout_s", "http_retries", "http_batch_size", "http_concurrency")
    _refuse_unread(args, rewards, servers, any_server, *http)
    return rewards


def load_judges(
    judge_funcs: RewardSource | Sequence[RewardSource],
    trained: RewardSource | Sequence[RewardSource] | None,
    args: RewardSettings,
    device: torch.device,
) -> dict[str, RewardFunction]:
    """Load rewards that score responses and are never trained on: name -> function.

    Args:
        judge_funcs: one or several, or none.
        trained: the run's rewards.
        args: how models and servers are loaded.
        device: where models are loaded.
    Raises:
        ValueError: see :func:`load_reward`; or the run is trained on one of them.
    """
    judges: dict[str, RewardFunction] = {}
    for source in listed(judge_funcs):
        if any(source is reward or (isinstance(source, str) and source == reward) for reward in listed(trained)):
            raise ValueError(f"judge {reward_source(source)!r} is also a reward: what trains a run cannot judge it")
        function = _load(source, args, device)
        judges[_new_name(function, judges)] = function
    return judges


def _load(source: RewardSource, args: RewardSettings, device: torch.device) -> RewardFunction:
    return load_reward(
        source,
        device=device,
        chat_template=args.reward_chat_template,
        max_length=args.reward_max_length,
        http_timeout_s=args.http_timeout_s,
        http_retries=args.http_retries,
        http_batch_size=args.http_batch_size,
        http_concurrency=args.http_concurrency,
    )


def _new_name(function: RewardFunction, taken: Collection[str]) -> str:
    name = reward_name(function)
    return f"{name}_{len(taken) + 1}" if name in taken else name


def _refuse_unread(
    args: RewardSettings, names: dict[str, tuple[RewardFunction, float]], kind: str, found: bool, *settings: str
) -> None:
    for setting in settings:
        if not found and is_changed(args, setting):
            raise ValueError(
                f"{setting}={getattr(args, setting)!r} is for {kind}, but none of the rewards {list(names)} is "
                "one: leave it out, or give it to RewardModel(...) or HTTPReward(...)"
            )


def check_servers(rewards: Mapping[str, RewardFunction], prompts: PromptSet, *, conversations: bool) -> None:
    """Send each reward server an empty answer to the first prompt, before models are loaded.

    Raises:
        ValueError: it is unreachable, refuses, or does not answer with one score.
    """
    batch = prompts.take([0])
    columns: Any = batch.columns
    empty: Completion = ""
    if conversations and not isinstance(batch.prompts[0], str):
        empty = [{"role": "assistant", "content": ""}]
    for name, function in rewards.items():
        if isinstance(function, HTTPReward):
            try:
                coerce_scores(function(batch.prompts, [empty], **columns), 1, name, [0])
            except RewardError as error:
                raise ValueError(f"{error}. Start the server or correct the address; nothing was generated") from None
