"""Errors of environments: report a crash, and check what the copies return."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from classic.envs.spaces import batch_of_one, is_finite, observation_encoder
from rlhf_ppo.runtime.errors import RunError

CRASHES = (Exception, SystemExit)
"""What a crashing environment raises: sys.exit() in one must not end a run as if it had succeeded."""

UNREADABLE = (ValueError, TypeError, KeyError, IndexError)
"""What the encoder raises for an observation outside its space."""


class BrokenEnvironmentError(RunError):
    """An environment crashed, or returned something that cannot be learned from; names environment and step."""


class OutputChecks:
    """Check what the copies return at each step; every error names the environment, the step and, if known, the copy.

    Args:
        env_id: the environment's name in messages.
        num_envs: copies.
        space: of one observation.
    """

    def __init__(self, env_id: str, num_envs: int, space: gymnasium.Space) -> None:
        self.env_id, self.num_envs, self.space = env_id, num_envs, space
        self.encode = observation_encoder(space)
        self.steps = 0
        """Steps since the last reset; the caller counts them."""

    def observations(self, observations: Any) -> np.ndarray:
        """Encode a batch of observations to [B, *O].

        Raises:
            BrokenEnvironmentError: a wrong shape or number of them, or a non-finite one.
        """
        try:
            array = self.encode(observations)
        except UNREADABLE as error:
            raise self.fault(f"observation cannot be read: {error}") from error
        if len(array) != self.num_envs:
            raise self.fault(f"there must be {self.num_envs} observations, one per copy, got {len(array)}")
        self._require_finite("observation", array)
        return array

    def final_observation(self, observation: Any, copy: int) -> np.ndarray:
        """Encode one copy's last observation to [*O]; None is an error."""
        if observation is None:
            raise self.fault("SAME_STEP autoreset without infos['final_obs']: the last observation is lost", copy)
        try:
            row = self.encode(batch_of_one(self.space, observation))[0]
        except UNREADABLE as error:
            raise self.fault(f"final observation cannot be read: {error}", copy) from error
        if not is_finite(row).all():
            raise self.fault(f"final observation is non-finite: {row.tolist()}", copy)
        return row

    def rewards(self, rewards: Any, mask: np.ndarray) -> np.ndarray:
        """Return rewards [B] as float64, which keeps small differences beside a large offset; 0 where mask is False."""
        array = np.asarray(rewards, dtype=np.float64)
        if array.shape != (self.num_envs,):
            raise self.fault(f"rewards must be ({self.num_envs},), got {array.shape}")
        array = np.where(mask, array, 0.0)
        self._require_finite("reward", array.astype(np.float32))
        return array

    def flags(self, name: str, flags: Any) -> np.ndarray:
        """Return ``terminated`` or ``truncated`` [B] as bool."""
        array = np.asarray(flags, dtype=bool)
        if array.shape != (self.num_envs,):
            raise self.fault(f"{name} must be ({self.num_envs},), got {array.shape}")
        return array

    def fault(self, what: str, copy: int | None = None) -> BrokenEnvironmentError:
        """Build the error for something that cannot be learned from."""
        where = "" if copy is None else f", copy {copy}"
        return BrokenEnvironmentError(f"environment {self.env_id!r}{where}, step {self.steps}: {what}")

    def crash(self, error: BaseException) -> BrokenEnvironmentError:
        """Build the error for a crash, with what Gymnasium's checker warned of before it."""
        original = error.args[0] if error.args and isinstance(error.args[0], BaseException) else error  # of a process
        words = "".join(f"\n{line}" for line in getattr(original, "__notes__", ()))
        return BrokenEnvironmentError(
            f"environment {self.env_id!r} failed at step {self.steps}: {type(error).__name__}: {error}{words}"
        )

    def _require_finite(self, name: str, array: np.ndarray) -> None:
        finite = is_finite(array)
        if not finite.all():
            copy = int(np.argwhere(~finite)[0][0])
            raise self.fault(f"{name} is non-finite: {array[copy].tolist()}", copy)
