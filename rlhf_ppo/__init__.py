"""PPO for language models; importing this package loads nothing heavy, its public names load what they need."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# torch backs large CPU tensors with huge pages if it finds this before the first one is made (Linux; elsewhere nothing
# happens): logits and gradients of a vocabulary otherwise cost thousands of page faults each time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# OpenMP reads this once, when torch loads it: threads that wait for each other sleep instead of keeping a CPU busy,
# which on a machine with anything else to do costs an iteration many times its work (docs/performance.md). Worker
# processes inherit it. GOMP_SPINCOUNT and KMP_BLOCKTIME, where somebody set them, still win.
THREADS_SPIN = "torch" in sys.modules and os.environ.keys().isdisjoint(
    ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
)
"""Whether torch was loaded first, so that it is too late; runs with several threads say so."""
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from rlhf_ppo.config.rlhf import RLHFConfig
    from rlhf_ppo.generation.rollout import Rollout
    from rlhf_ppo.rewards.functions import StepRewards
    from rlhf_ppo.rewards.http_client import HTTPReward
    from rlhf_ppo.rewards.reward_model import RewardModel
    from rlhf_ppo.trainer import PPOTrainer

__version__ = "0.1.0"
__all__ = ["HTTPReward", "PPOTrainer", "RLHFConfig", "RewardModel", "Rollout", "StepRewards", "__version__"]

_HOMES = {
    "HTTPReward": "rlhf_ppo.rewards.http_client",
    "PPOTrainer": "rlhf_ppo.trainer",
    "RLHFConfig": "rlhf_ppo.config.rlhf",
    "RewardModel": "rlhf_ppo.rewards.reward_model",
    "Rollout": "rlhf_ppo.generation.rollout",
    "StepRewards": "rlhf_ppo.rewards.scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
