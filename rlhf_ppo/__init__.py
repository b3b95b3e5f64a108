"""PPO for language models; importing this package loads nothing heavy, its public names load what they need."""

from __future__ import annotations

from typing import TYPE_CHECKING

# Before torch: it sets variables that torch reads.
from rlhf_ppo.core.lazy import lazy_names
from rlhf_ppo.runtime.package import __version__, find_moved_modules

if TYPE_CHECKING:
    from rlhf_ppo.config.rlhf import RLHFConfig
    from rlhf_ppo.generation.environments.episodes import TextEnvironment
    from rlhf_ppo.generation.rollout import Rollout
    from rlhf_ppo.rewards.functions import StepRewards
    from rlhf_ppo.rewards.http_client import HTTPReward
    from rlhf_ppo.rewards.reward_model import RewardModel
    from rlhf_ppo.trainer import PPOTrainer
    from rlhf_ppo.training.trainer.callbacks import Callback

__all__ = [
    "Callback",
    "HTTPReward",
    "PPOTrainer",
    "RLHFConfig",
    "RewardModel",
    "Rollout",
    "StepRewards",
    "TextEnvironment",
    "__version__",
]

_HOMES = {
    "Callback": "rlhf_ppo.training.trainer.callbacks",
    "HTTPReward": "rlhf_ppo.rewards.http_client",
    "PPOTrainer": "rlhf_ppo.trainer",
    "RLHFConfig": "rlhf_ppo.config.rlhf",
    "RewardModel": "rlhf_ppo.rewards.reward_model",
    "Rollout": "rlhf_ppo.generation.rollout",
    "StepRewards": "rlhf_ppo.rewards.functions",
    "TextEnvironment": "rlhf_ppo.generation.environments.episodes",
}

__getattr__ = lazy_names(__name__, _HOMES)
find_moved_modules()


def __dir__() -> list[str]:
    return __all__
