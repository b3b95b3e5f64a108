"""Rewards: reward functions, reward models and servers, and their scores."""

from rlhf_ppo.core.lazy import lazy_names

__getattr__ = lazy_names(__name__, dict.fromkeys(("load_reward", "reward_name"), "rlhf_ppo.rewards.loading"))
