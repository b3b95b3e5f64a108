"""Rewards: functions, reward models and servers, by object or by name, behind one signature."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rlhf_ppo.http_reward import HTTPReward
from rlhf_ppo.reward_calls import RewardError, RewardFunction, reward_name
from rlhf_ppo.reward_model import RewardModel
from rlhf_ppo.scoring import StepRewards, coerce_scores, score
from rlhf_ppo.user_code import load_function

__all__ = [
    "HTTPReward",
    "RewardError",
    "RewardFunction",
    "RewardModel",
    "StepRewards",
    "coerce_scores",
    "load_reward",
    "reward_name",
    "score",
]


def load_reward(
    source: RewardFunction | str | PreTrainedModel,
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
            :class:`rlhf_ppo.http_reward.HTTPReward`.
    Raises:
        ValueError: the file, module or function is not there, the model does not fit (see
            :class:`rlhf_ppo.RewardModel`), or the address is none.
    """
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
