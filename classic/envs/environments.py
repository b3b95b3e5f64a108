"""Step Gymnasium's vector environments: one step() for both autoreset modes, which checks what the copies return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import Tensor

from classic.config import Vectorization
from classic.envs.episode_state import episode_state, restore_episodes
from classic.envs.errors import CRASHES, BrokenEnvironmentError, OutputChecks
from classic.envs.make_env import EnvLike, env_name, make_vector_env
from classic.envs.masks import ActionMasks
from classic.envs.seeds import Purpose, derive_seeds
from classic.envs.spaces import action_layout, batch_of_one, observation_shape, to_env_actions
from classic.envs.truncation import Episode, RunningEpisodes, Step, final_observation
from classic.envs.wrappers import RecordedEpisode, all_have, call_each, normalizing_wrappers, warn_once

NO_ENVS = torch.empty(0, dtype=torch.int64)


class Environments:
    """Copies of an environment, stepped together.

    ``observations`` [B, *O] are the copies' current ones, encoded; ``starting`` [B] bool, the observation begins an
    episode; ``resetting`` [B] bool, the next step only resets (:mod:`classic.envs.truncation`); ``action_masks``
    [B, options] bool, True for allowed options, or None if the environment has no masks.
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
            squash: continuous actions are squashed into their bounds by tanh instead of clipped to them.
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
        self._checks = OutputChecks(self.env_id, num_envs, self.observation_space)
        self.encode = self._checks.encode
        self.next_step_autoreset = self.envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP

    def reset(self, seed: int, purpose: Purpose = "training", *, begun: int = 0) -> None:
        """Begin new episodes in every copy; the arguments are those of :func:`derive_seeds`."""
        self._checks.steps = 0
        seeds = derive_seeds(seed, purpose, self.num_envs, begun=begun)
        # A vector environment of another kind draws for all of its copies from one generator.
        separate = isinstance(self.envs.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        given: Any = seeds if separate else seeds[0]
        observation, info = self._guarded(lambda: self.envs.reset(seed=given))
        self.observations = torch.from_numpy(self._checks.observations(observation))
        self._episodes = RunningEpisodes(self.num_envs, self.next_step_autoreset)
        self.action_masks = self._read_masks(info, expected=None)

    def step(self, actions: Tensor) -> Step:
        """Step every copy with the policy's actions: [B] or [B, choices] indices, or [B, dimensions] numbers.

        Raises:
            BrokenEnvironmentError: a crash (chained), a wrong shape, a NaN or infinity; names environment and step.
        """
        checks = self._checks
        checks.steps += 1
        chosen = to_env_actions(actions, self.action_space, self.squash)
        observation, reward, terminated, truncated, info = self._guarded(lambda: self.envs.step(chosen))
        mask = ~self.resetting.numpy()
        observations = torch.from_numpy(checks.observations(observation))
        rewards = checks.rewards(reward, mask)
        ended = checks.flags("terminated", terminated) & mask
        cut = checks.flags("truncated", truncated) & mask
        # Returns are sums of float32 in checkpoints, too.
        episodes = self._episodes.advance(rewards.astype(np.float32), mask, ended | cut)
        final_envs, final_observations = NO_ENVS, observations[:0]
        if episodes and not self.next_step_autoreset:
            copies = [episode.env for episode in episodes]
            finals = [checks.final_observation(final_observation(info, copy), copy) for copy in copies]
            final_envs, final_observations = torch.tensor(copies), torch.from_numpy(np.stack(finals))
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
            info,
        )

    @property
    def starting(self) -> Tensor:
        """[B] bool, the current observation begins an episode."""
        return self._episodes.starting

    @property
    def resetting(self) -> Tensor:
        """[B] bool, the next step only resets, whatever the action."""
        return self._episodes.resetting

    @property
    def lengths(self) -> np.ndarray:
        """[B] steps of the running episodes."""
        return self._episodes.lengths

    def running_episode(self, copy: int) -> Episode:
        """Return a copy's episode so far."""
        return self._episodes.episode(copy)

    def get_attr(self, name: str) -> list[Any]:
        """Return an attribute of each copy (or of the one object that steps them all)."""
        self._require_attribute(name)
        inner: Any = self.envs.unwrapped
        return list(inner.get_attr(name)) if hasattr(inner, "get_attr") else [getattr(inner, name)]

    def set_attr(self, name: str, value: Any) -> None:
        """Set an attribute of every copy, as a curriculum does; a list or tuple has one value for each.

        Raises:
            ValueError: the environment has no such attribute.
        """
        self._require_attribute(name)
        inner: Any = self.envs.unwrapped
        inner.set_attr(name, value) if hasattr(inner, "set_attr") else setattr(inner, name, value)

    def call(self, name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of every copy (or of the one object that steps them all); return the answers."""
        self._require_attribute(name)
        inner: Any = self.envs.unwrapped
        if hasattr(inner, "call"):
            return list(inner.call(name, *args, **kwargs))
        return [getattr(inner, name)(*args, **kwargs)]

    def own_statistics(self) -> list[str]:
        """Return the names of wrappers that normalise by statistics of their own."""
        of_copies = [name for names in call_each(self.envs, "own_statistics") for name in names]
        return sorted({*normalizing_wrappers(self.envs), *of_copies})

    def time_limit(self) -> int | None:
        """Return the steps after which the environment itself truncates an episode; None if that is unknown."""
        answers = call_each(self.envs, "time_limit")
        return answers[0] if answers else getattr(self.envs.unwrapped, "max_episode_steps", None)

    def observed_masks(self, observations: Tensor) -> Tensor | None:
        """Read masks [N, options] bool from encoded observations, or None; one that allows nothing becomes all True."""
        if self._masks.observed is None:
            return None
        masks = observations[:, self._masks.observed] != 0
        return masks | ~masks.any(dim=1, keepdim=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Return (tensors, JSON) for :meth:`restore`; JSON is None if running episodes cannot be saved."""
        running = episode_state(self.envs)
        if running is None:
            return {}, None
        tensors, state = running
        own = {"observations": self.observations, **self._episodes.state()}
        if self.action_masks is not None:
            own["action_masks"] = self.action_masks
        return {**{f"episodes.{name}": x for name, x in tensors.items()}, **own}, {**state, "step": self._checks.steps}

    def restore(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> bool:
        """Restore running episodes; False if the environment did not come back the same, and must be reset."""
        inner = {n.removeprefix("episodes."): x for n, x in tensors.items() if n.startswith("episodes.")}
        try:
            replayed = self._guarded(lambda: restore_episodes(self.envs, inner, state))
        except BrokenEnvironmentError:
            return False  # what was possible then is not now, so it is not the same episode
        if replayed is None:
            return False
        for copy, (observation, rewards) in enumerate(replayed):
            encoded = self.encode(batch_of_one(self.observation_space, observation))
            seen = tensors["observations"][copy].numpy()  # float32 in checkpoints of earlier versions
            if not np.array_equal(encoded[0].astype(seen.dtype), seen):
                return False
            total = np.sum(np.array(rewards, dtype=np.float32), dtype=np.float64)
            # Of an episode that is over and waits for its reset, the sum is no longer kept.
            if not tensors["resetting"][copy] and not np.isclose(total, tensors["returns"][copy].item(), rtol=1e-9):
                return False
        self.observations = tensors["observations"]
        self._episodes = RunningEpisodes(self.num_envs, self.next_step_autoreset)
        self._episodes.load(tensors)
        self.action_masks = tensors.get("action_masks")
        if self.action_masks is None and self._masks.observed is not None:  # versions that did not read them there
            self.action_masks = self._read_masks({}, expected=None)
        self._checks.steps = state["step"]
        return True

    def record_episodes(self, wanted: bool) -> None:
        """Record what checkpoints need of copies stepped one after another, from their next episodes on; or stop."""
        for copy in getattr(self.envs.unwrapped, "envs", ()):
            if isinstance(copy, RecordedEpisode):
                copy.record(wanted)

    def close(self) -> None:
        """Release the environments."""
        self.envs.close()

    def _require_attribute(self, name: str) -> None:
        inner = self.envs.unwrapped
        separate = isinstance(inner, SyncVectorEnv | AsyncVectorEnv)
        if not (all_have(self.envs, name) if separate else hasattr(inner, name)):
            raise ValueError(f"environment {self.env_id!r} has no attribute {name!r}: give it one, or name another")

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Call into the environments, turn a crash into an error, and pass on the checker's warnings."""
        try:
            result = call()
        except CRASHES as error:
            raise self._checks.crash(error) from error
        if self._checks.steps <= 1:
            warn_once([warning for caught in call_each(self.envs, "caught_warnings") for warning in caught])
        return result

    def _read_masks(self, info: dict[str, Any], *, expected: bool | None) -> Tensor | None:
        try:
            return self._masks.read(info, self.observations, self.resetting, expected=expected)
        except ValueError as error:
            raise self._checks.fault(str(error)) from None
        except CRASHES as error:  # of its action_masks()
            raise self._checks.crash(error) from error
