"""Environments: Gymnasium's vector environments behind one step() that knows autoreset and checks what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import Tensor

from classic.envs.episode_state import RecordedEpisode, episode_state, restore_episodes
from classic.envs.errors import CRASHES, BrokenEnvironmentError
from classic.envs.make_env import EnvLike, Vectorization, env_name, make_vector_env
from classic.envs.masks import ActionMasks
from classic.envs.seeds import Purpose, derive_seeds
from classic.envs.spaces import (
    action_layout,
    batch_of_one,
    is_finite,
    observation_encoder,
    observation_shape,
    to_env_actions,
)
from classic.envs.wrappers import ask_copies, normalizing_layers, pass_on

NO_ENVS = torch.empty(0, dtype=torch.int64)


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
    """[K, *O] the true last observations of those copies."""
    episodes: list[Episode]
    """Episodes that ended here."""


class Environments:
    """Environment copies stepped together; remembers which of them only reset at the next step.

    ``observations`` [B, *O] is what the next action is chosen on, as the environment said it. Three more facts about
    it: ``starting`` [B] bool, it begins an episode; ``resetting`` [B] bool, its action will be ignored because
    Gymnasium's NEXT_STEP autoreset spends the step on the reset; ``action_masks`` [B, options] bool, what is allowed,
    or None if the environment does not say.
    """

    def __init__(
        self,
        env: EnvLike,
        num_envs: int,
        autoreset_mode: str | None = None,
        *,
        vectorization: Vectorization = "auto",
        env_kwargs: Mapping[str, Any] | None = None,
        wrappers: Sequence[str] = (),
        action_masks: bool | None = None,
        squash: bool = False,
    ) -> None:
        """Make the copies.

        Args:
            env, num_envs, autoreset_mode, vectorization, env_kwargs, wrappers: see :func:`make_vector_env`.
            action_masks: see :class:`ActionMasks`.
            squash: numbers are brought within their bounds by tanh instead of being clipped to them.
        Raises:
            ValueError: unsupported spaces, and what :func:`make_vector_env` and :class:`ActionMasks` refuse.
            BrokenEnvironmentError: the environment cannot be created.
        """
        self.env_id, self.num_envs, self.squash = env_name(env), num_envs, squash
        self.envs = make_vector_env(
            env, num_envs, autoreset_mode, vectorization=vectorization, env_kwargs=env_kwargs, wrappers=wrappers
        )
        self.observation_space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space
        where = f"environment {self.env_id!r}"
        try:
            self.observation_shape = observation_shape(self.observation_space, where)
            self.actions = action_layout(self.action_space, where)
            space = self.action_space
            if squash and isinstance(space, Box) and not np.isfinite([space.low, space.high]).all():
                raise ValueError(f"squash=True needs finite bounds, but {where} has the actions {self.action_space}")
            self._masks = ActionMasks(self.envs, self.actions, where, action_masks)
        except ValueError:
            self.envs.close()
            raise
        self.encode = observation_encoder(self.observation_space)
        self.next_step_autoreset = self.envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        self.steps = 0

    def reset(self, seed: int, purpose: Purpose = "training", *, begun: int = 0) -> None:
        """Begin new episodes everywhere; the arguments are those of :func:`derive_seeds`."""
        self.steps = 0
        seeds = derive_seeds(seed, purpose, self.num_envs, begun=begun)
        # A vector environment of another kind draws for all of its copies from one generator.
        separate = isinstance(self.envs.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        given: Any = seeds if separate else seeds[0]
        observation, info = self._guarded(lambda: self.envs.reset(seed=given))
        self.observations = self._checked_observations(observation)
        self.resetting = torch.zeros(self.num_envs, dtype=torch.bool)
        self.starting = torch.ones(self.num_envs, dtype=torch.bool)
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)
        self.action_masks = self._read_masks(info, expected=None)

    def step(self, actions: Tensor) -> Step:
        """Step every copy with the policy's actions, [B] or [B, choices] indices or [B, numbers].

        Raises:
            BrokenEnvironmentError: a crash (chained), a wrong shape, a NaN or infinity; names environment and step.
        """
        self.steps += 1
        chosen = to_env_actions(actions, self.action_space, self.squash)
        observation, reward, terminated, truncated, info = self._guarded(lambda: self.envs.step(chosen))
        mask = ~self.resetting.numpy()
        observations = self._checked_observations(observation)
        rewards = self._checked_rewards(reward, mask)
        ended = self._flags("terminated", terminated) & mask
        cut = self._flags("truncated", truncated) & mask
        done = ended | cut

        self._returns += rewards
        self._lengths += mask
        episodes, final_envs, final_observations = [], NO_ENVS, observations[:0]
        if done.any():
            finished = np.flatnonzero(done)
            episodes = [Episode(i, float(self._returns[i]), int(self._lengths[i])) for i in finished.tolist()]
            self._returns[done] = 0.0
            self._lengths[done] = 0
            if not self.next_step_autoreset:
                final_envs = torch.from_numpy(finished)
                final_observations = self._final_observations(info, final_envs)
        over = torch.from_numpy(done)
        if self.next_step_autoreset:
            self.starting, self.resetting = self.resetting, over
        else:
            self.starting = over
        self.observations = observations
        self.action_masks = self._read_masks(info, expected=self.action_masks is not None)
        return Step(
            torch.from_numpy(rewards),
            torch.from_numpy(ended),
            torch.from_numpy(cut),
            torch.from_numpy(mask),
            final_envs,
            final_observations,
            episodes,
        )

    def own_statistics(self) -> list[str]:
        """Names of wrappers that normalise by statistics of their own."""
        of_copies = [name for names in ask_copies(self.envs, "own_statistics") for name in names]
        return sorted({*normalizing_layers(self.envs), *of_copies})

    def time_limit(self) -> int | None:
        """Steps after which the environment itself cuts an episode, where that is known."""
        answers = ask_copies(self.envs, "time_limit")
        return answers[0] if answers else getattr(self.envs.unwrapped, "max_episode_steps", None)

    def running_episode(self, copy: int) -> Episode:
        """What a copy's episode has brought so far."""
        return Episode(copy, float(self._returns[copy]), int(self._lengths[copy]))

    @property
    def lengths(self) -> np.ndarray:
        """[B] decisions taken in the running episodes."""
        return self._lengths

    def observed_masks(self, observations: Tensor) -> Tensor | None:
        """[N, options] bool, what encoded observations say is allowed (all, where they name nothing); None: nothing."""
        if self._masks.observed is None:
            return None
        masks = observations[:, self._masks.observed] != 0
        return masks | ~masks.any(dim=1, keepdim=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """(tensors, JSON) that :meth:`restore` takes; JSON is None where running episodes cannot be saved."""
        running = episode_state(self.envs)
        if running is None:
            return {}, None
        tensors, state = running
        own = {"observations": self.observations, "resetting": self.resetting, "starting": self.starting}
        own |= {"returns": torch.from_numpy(self._returns), "lengths": torch.from_numpy(self._lengths)}
        if self.action_masks is not None:
            own["action_masks"] = self.action_masks
        return {**{f"episodes.{name}": x for name, x in tensors.items()}, **own}, {**state, "step": self.steps}

    def restore(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> bool:
        """Set running episodes up again; False if the environment did not come back the same, and must be reset."""
        inner = {n.removeprefix("episodes."): x for n, x in tensors.items() if n.startswith("episodes.")}
        try:
            came_back = self._guarded(lambda: restore_episodes(self.envs, inner, state))
        except BrokenEnvironmentError:
            return False  # what was possible then is not now, so it is not the same episode
        if came_back is None:
            return False
        for copy, (observation, rewards) in enumerate(came_back):
            encoded = self.encode(batch_of_one(self.observation_space, observation))
            seen = tensors["observations"][copy].numpy()  # float32 in checkpoints of earlier versions
            if not np.array_equal(encoded[0].astype(seen.dtype), seen):
                return False
            total = np.sum(np.array(rewards, dtype=np.float32), dtype=np.float64)
            # Of an episode that is over and waits for its reset, the sum is no longer kept.
            if not tensors["resetting"][copy] and not np.isclose(total, tensors["returns"][copy].item(), rtol=1e-9):
                return False
        self.observations, self.resetting, self.starting = (
            tensors[name] for name in ("observations", "resetting", "starting")
        )
        self.action_masks = tensors.get("action_masks")
        if self.action_masks is None and self._masks.observed is not None:  # versions that did not read them there
            self.action_masks = self._read_masks({}, expected=None)
        self._returns, self._lengths = tensors["returns"].numpy().copy(), tensors["lengths"].numpy().copy()
        self.steps = state["step"]
        return True

    def record_episodes(self, wanted: bool) -> None:
        """Whether copies stepped one by one keep what checkpoints need of them, from their next episodes on."""
        for copy in getattr(self.envs.unwrapped, "envs", ()):
            if isinstance(copy, RecordedEpisode):
                copy.record(wanted)

    def close(self) -> None:
        """Release the environments."""
        self.envs.close()

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            result = call()
        except CRASHES as error:
            raise self._crash(error) from error
        if self.steps <= 1:
            pass_on([warning for heard in ask_copies(self.envs, "heard_warnings") for warning in heard])
        return result

    def _crash(self, error: BaseException) -> BrokenEnvironmentError:
        # What Gymnasium's checker said before it explains the crash.
        original = error.args[0] if error.args and isinstance(error.args[0], BaseException) else error  # of a process
        words = "".join(f"\n{line}" for line in getattr(original, "__notes__", ()))
        return BrokenEnvironmentError(
            f"environment {self.env_id!r} failed at step {self.steps}: {type(error).__name__}: {error}{words}"
        )

    def _fault(self, what: str, env: int | None = None) -> BrokenEnvironmentError:
        copy = "" if env is None else f", copy {env}"
        return BrokenEnvironmentError(f"environment {self.env_id!r}{copy}, step {self.steps}: {what}")

    def _read_masks(self, info: dict[str, Any], *, expected: bool | None) -> Tensor | None:
        try:
            return self._masks.read(info, self.observations, self.resetting, expected=expected)
        except ValueError as error:
            raise self._fault(str(error)) from None
        except CRASHES as error:  # of its action_masks()
            raise self._crash(error) from error

    def _checked_observations(self, observation: Any) -> Tensor:
        try:
            array = self.encode(observation)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise self._fault(f"observation cannot be read: {error}") from error
        if len(array) != self.num_envs:
            raise self._fault(f"there must be {self.num_envs} observations, one a copy, got {len(array)}")
        self._require_finite("observation", array)
        return torch.from_numpy(array)

    def _checked_rewards(self, reward: Any, mask: np.ndarray) -> np.ndarray:
        array = np.asarray(reward, dtype=np.float32)
        if array.shape != (self.num_envs,):
            raise self._fault(f"rewards must be ({self.num_envs},), got {array.shape}")
        array = np.where(mask, array, np.float32(0))
        self._require_finite("reward", array)
        return array

    def _require_finite(self, name: str, array: np.ndarray) -> None:
        finite = is_finite(array)
        if not finite.all():
            env = int(np.argwhere(~finite)[0][0])
            raise self._fault(f"{name} is not finite: {array[env].tolist()}", env)

    def _flags(self, name: str, flags: Any) -> np.ndarray:
        array = np.asarray(flags, dtype=bool)
        if array.shape != (self.num_envs,):
            raise self._fault(f"{name} must be ({self.num_envs},), got {array.shape}")
        return array

    def _final_observations(self, info: dict[str, Any], envs: Tensor) -> Tensor:
        finals = info.get("final_obs")
        rows = []
        for env in envs.tolist():
            final = None if finals is None else _row(finals, env)
            if final is None:
                raise self._fault("SAME_STEP autoreset without infos['final_obs']: the last observation is lost", env)
            try:
                row = self.encode(batch_of_one(self.observation_space, final))[0]
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise self._fault(f"final observation cannot be read: {error}", env) from error
            if not is_finite(row).all():
                raise self._fault(f"final observation is not finite: {row.tolist()}", env)
            rows.append(row)
        return torch.from_numpy(np.stack(rows))


def _row(batch: Any, index: int) -> Any:
    """One observation of several: Gymnasium's are an array of objects, others' one batch in the parts of the space."""
    if isinstance(batch, Mapping):
        return {key: _row(part, index) for key, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_row(part, index) for part in batch)
    return batch[index]
