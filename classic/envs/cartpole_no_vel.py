"""CartPole without its velocities, so that a policy must remember to balance it: CartPoleNoVel-v1."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

ID = "CartPoleNoVel-v1"


class HideVelocity(gymnasium.ObservationWrapper):
    """Keeps the position of the cart and the angle of the pole.

    RL Zoo's environment of this name sets the two velocities to 0 instead, which tells a policy as little.
    """

    KEPT = (0, 2)

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        space: Any = env.observation_space
        self.observation_space = Box(space.low[list(self.KEPT)], space.high[list(self.KEPT)], dtype=space.dtype)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """[4] to [2]."""
        return observation[list(self.KEPT)]


def make(**kwargs: Any) -> gymnasium.Env:
    """CartPole with its velocities hidden; the time limit is the registration's."""
    return HideVelocity(gymnasium.make("CartPole-v1", max_episode_steps=-1, **kwargs))


if ID not in gymnasium.registry:
    gymnasium.register(
        ID, entry_point="classic.envs.cartpole_no_vel:make", max_episode_steps=500, reward_threshold=475.0
    )
