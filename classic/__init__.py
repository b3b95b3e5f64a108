"""PPO on Gymnasium control tasks: the algorithm where its answer is known."""

import rlhf_ppo  # noqa: F401 - before torch, whose threads it tells how to wait

# isort: split
import classic.envs.wrappers  # noqa: F401 - registers CartPoleNoVel-v1
from classic.config import PPOArgs
from classic.envs.errors import BrokenEnvironmentError
from classic.ppo import PPO
from rlhf_ppo.runtime.errors import NonFiniteGradientError

__all__ = ["PPO", "BrokenEnvironmentError", "NonFiniteGradientError", "PPOArgs"]
