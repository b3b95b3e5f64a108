"""PPO on Gymnasium control tasks: the algorithm where its answer is known."""

from typing import TYPE_CHECKING

import classic.envs.wrappers  # noqa: F401 - registers CartPoleNoVel-v1
import rlhf_ppo  # noqa: F401 - before torch, whose threads it tells how to wait
from rlhf_ppo.core.lazy import lazy_names

if TYPE_CHECKING:
    from classic.config import PPOArgs
    from classic.envs.errors import BrokenEnvironmentError
    from classic.ppo import PPO
    from rlhf_ppo.runtime.errors import NonFiniteGradientError

__all__ = ["PPO", "BrokenEnvironmentError", "NonFiniteGradientError", "PPOArgs"]

__getattr__ = lazy_names(
    __name__,
    {
        "BrokenEnvironmentError": "classic.envs.errors",
        "NonFiniteGradientError": "rlhf_ppo.runtime.errors",
        "PPO": "classic.ppo",
        "PPOArgs": "classic.config",
    },
    modules="callbacks config evaluation report rollout update",
)


def __dir__() -> list[str]:
    return __all__
