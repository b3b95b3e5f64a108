"""Environments: Gymnasium's vector environments behind one step() that knows autoreset and checks what comes out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

MODES = {"next_step": AutoresetMode.NEXT_STEP, "same_step": AutoresetMode.SAME_STEP}


class BrokenEnvironmentError(RuntimeError):
    """An environment crashed or returned something that cannot be learned from; says which one, and at which step."""


class Episode(NamedTuple):
    """A finished episode."""

    env: int
    """Index of the environment copy."""
    total_reward: float
    """Undiscounted return."""
    length: int
    """Decisions taken."""


@dataclass(frozen=True)
class Step:
    """What one step of all copies brought."""

    rewards: Tensor
    """[B] float32; 0 where mask is False."""
    terminated: Tensor
    """[B] bool, the episode ended."""
    truncated: Tensor
    """[B] bool, the episode was cut."""
    mask: Tensor
    """[B] bool, False for autoreset dummy steps, whose action the environment ignored."""
    final_envs: Tensor
    """[K] copies whose episode ended here and whose next observation is already the new episode's (SAME_STEP)."""
    final_observations: Tensor
    """[K, O] the true last observations of those copies."""
    episodes: list[Episode]
    """Episodes that ended here."""


def make_vector_env(env_id: str, num_envs: int, autoreset_mode: str | None) -> VectorEnv:
    """Gymnasium's vector environment with the wanted autoreset mode.

    Args:
        env_id: registered id, or ``module:id``.
        num_envs: copies.
        autoreset_mode: next_step or same_step; None takes what Gymnasium's default for the id does.
    Raises:
        ValueError: unknown id (with Gymnasium's suggestion), or an autoreset mode that is missing or not supported.
        BrokenEnvironmentError: the environment cannot be created.
    """
    envs = _make(env_id, num_envs)
    wanted = MODES[autoreset_mode] if autoreset_mode else None
    if wanted is not None and envs.metadata.get("autoreset_mode") != wanted:
        envs.close()
        envs = _make(env_id, num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": wanted})
    mode = envs.metadata.get("autoreset_mode")
    if mode not in MODES.values():
        envs.close()
        raise ValueError(
            f"environment {env_id!r}: metadata['autoreset_mode'] is {mode!r}, so a reset cannot be told from a step; "
            "a vector environment must declare AutoresetMode.NEXT_STEP or SAME_STEP"
        )
    return envs


def _make(env_id: str, num_envs: int, **kwargs: Any) -> VectorEnv:
    try:
        with warnings.catch_warnings():
            # Missing metadata is an error of ours, which says more.
            warnings.filterwarnings("ignore", message=".*AutoresetMode.*")
            return gymnasium.make_vec(env_id, num_envs=num_envs, **kwargs)
    except gymnasium.error.Error as error:
        raise ValueError(f"cannot make environment {env_id!r}: {error}") from error
    except ImportError:
        raise
    except Exception as error:
        raise BrokenEnvironmentError(f"environment {env_id!r} failed while it was made: {_describe(error)}") from error


def check_spaces(env_id: str, envs: VectorEnv) -> None:
    """Raise a ValueError that names the space and the way out unless it is supported.

    Supported: Box observations with one axis; Discrete actions, and Box actions with one axis.
    """
    observation, action = envs.single_observation_space, envs.single_action_space
    if not isinstance(observation, Box) or len(observation.shape) != 1:
        kind = type(observation).__name__ + (f"{observation.shape}" if isinstance(observation, Box) else "")
        raise ValueError(
            f"environment {env_id!r}: {kind} observations are not supported yet: wrap with FlattenObservation "
            "(gymnasium.wrappers) to make them a Box with one axis"
        )
    if not isinstance(action, Discrete) and not (isinstance(action, Box) and len(action.shape) == 1):
        kind = type(action).__name__ + (f"{action.shape}" if isinstance(action, Box) else "")
        raise ValueError(
            f"environment {env_id!r}: {kind} actions are not supported yet: Discrete actions and Box actions with one "
            "axis are; wrap with TransformAction (gymnasium.wrappers) to turn one of those into yours"
        )


class Environments:
    """Environment copies stepped together; remembers which of them only reset at the next step.

    ``observations`` [B, O] float32 is what the next action is chosen on, and ``resetting`` [B] bool is True where that
    action will be ignored because Gymnasium's NEXT_STEP autoreset spends the step on the reset.
    """

    def __init__(self, env_id: str, num_envs: int, autoreset_mode: str | None = None) -> None:
        """Make the copies; errors are those of :func:`make_vector_env` and :func:`check_spaces`."""
        self.env_id = env_id
        self.envs = make_vector_env(env_id, num_envs, autoreset_mode)
        try:
            check_spaces(env_id, self.envs)
        except ValueError:
            self.envs.close()
            raise
        self.num_envs = num_envs
        self.next_step_autoreset = self.envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        self.action_space = self.envs.single_action_space
        self.num_features = int(np.prod(self.envs.single_observation_space.shape or ()))
        self.steps = 0

    @property
    def continuous(self) -> bool:
        """True for Box actions."""
        return isinstance(self.action_space, Box)

    @property
    def num_actions(self) -> int:
        """Choices of a Discrete action, or the length of a Box action."""
        space = self.action_space
        return int(space.n) if isinstance(space, Discrete) else int(np.prod(space.shape or ()))

    def reset(self, seed: int) -> None:
        """Begin new episodes everywhere."""
        self.steps = 0
        observation, _ = self._guarded(lambda: self.envs.reset(seed=seed))
        self.observations = self._checked_observations(observation)
        self.resetting = torch.zeros(self.num_envs, dtype=torch.bool)
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)

    def step(self, actions: Tensor) -> Step:
        """Step every copy with the policy's actions, [B] indices or [B, A] numbers (kept within the action space).

        Raises:
            BrokenEnvironmentError: a crash (chained), a wrong shape, a NaN or infinity; names environment and step.
        """
        self.steps += 1
        chosen = to_env_actions(actions, self.action_space)
        observation, reward, terminated, truncated, info = self._guarded(lambda: self.envs.step(chosen))
        mask = ~self.resetting
        observations = self._checked_observations(observation)
        rewards = self._checked_rewards(reward, mask)
        ended = self._flags("terminated", terminated) & mask
        cut = self._flags("truncated", truncated) & mask
        done = ended | cut

        self._returns += rewards.numpy()
        self._lengths += mask.numpy()
        finished = done.nonzero().flatten()
        episodes = [Episode(i, float(self._returns[i]), int(self._lengths[i])) for i in finished.tolist()]
        self._returns[done.numpy()] = 0.0
        self._lengths[done.numpy()] = 0

        final_envs = torch.empty(0, dtype=torch.int64)
        final_observations = observations[:0]
        if self.next_step_autoreset:
            self.resetting = done
        elif episodes:
            final_envs = finished
            final_observations = self._final_observations(info, final_envs)
        self.observations = observations
        return Step(rewards, ended, cut, mask, final_envs, final_observations, episodes)

    def close(self) -> None:
        """Release the environments."""
        self.envs.close()

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise BrokenEnvironmentError(
                f"environment {self.env_id!r} failed at step {self.steps}: {_describe(error)}"
            ) from error

    def _fault(self, what: str, env: int | None = None) -> BrokenEnvironmentError:
        copy = "" if env is None else f", copy {env}"
        return BrokenEnvironmentError(f"environment {self.env_id!r}{copy}, step {self.steps}: {what}")

    def _checked_observations(self, observation: Any) -> Tensor:
        # A copy: Gymnasium may write the next observation into the same buffer.
        array = np.array(observation, dtype=np.float32, order="C")
        expected = (self.num_envs, self.num_features)
        if array.shape != expected:
            raise self._fault(f"observations must be {expected} (copies, features), got {array.shape}")
        self._require_finite("observation", array)
        return torch.from_numpy(array)

    def _checked_rewards(self, reward: Any, mask: Tensor) -> Tensor:
        array = np.asarray(reward, dtype=np.float32)
        if array.shape != (self.num_envs,):
            raise self._fault(f"rewards must be ({self.num_envs},), got {array.shape}")
        array = np.where(mask.numpy(), array, np.float32(0))
        self._require_finite("reward", array)
        return torch.from_numpy(array)

    def _require_finite(self, name: str, array: np.ndarray) -> None:
        finite = np.isfinite(array)
        if not finite.all():
            env = int(np.argwhere(~finite)[0][0])
            raise self._fault(f"{name} is not finite: {array[env].tolist()}", env)

    def _flags(self, name: str, flags: Any) -> Tensor:
        array = np.array(flags, dtype=bool)
        if array.shape != (self.num_envs,):
            raise self._fault(f"{name} must be ({self.num_envs},), got {array.shape}")
        return torch.from_numpy(array)

    def _final_observations(self, info: dict[str, Any], envs: Tensor) -> Tensor:
        finals = info.get("final_obs")
        rows = []
        for env in envs.tolist():
            if finals is None or finals[env] is None:
                raise self._fault("SAME_STEP autoreset without infos['final_obs']: the last observation is lost", env)
            row = np.array(finals[env], dtype=np.float32)
            if row.shape != (self.num_features,):
                raise self._fault(f"final observation must be ({self.num_features},), got {row.shape}", env)
            if not np.isfinite(row).all():
                raise self._fault(f"final observation is not finite: {row.tolist()}", env)
            rows.append(row)
        return torch.from_numpy(np.stack(rows))


def to_env_actions(actions: Tensor, space: Any) -> np.ndarray:
    """The policy's actions as the environment wants them: Discrete from its own start, Box within its bounds."""
    array = actions.numpy()
    if isinstance(space, Discrete):
        return (array + space.start).astype(space.dtype)
    return np.clip(array, space.low, space.high).astype(space.dtype)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
