"""Rewards: reward functions, reward models and servers, and their scores."""

from rlhf_ppo.core.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "RewardError": "rlhf_ppo.rewards.validation",
        "RewardModel": "rlhf_ppo.rewards.reward_model",
        "HTTPReward": "rlhf_ppo.rewards.http_client",
        "StepRewards": "rlhf_ppo.rewards.functions",
        "load_reward": "rlhf_ppo.rewards.loading",
        "reward_name": "rlhf_ppo.rewards.loading",
    },
)
