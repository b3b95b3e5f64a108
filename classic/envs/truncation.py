"""Termination, truncation and autoreset: which steps end an episode, which only reset, which observation came last.

A terminated episode is over: nothing follows. A truncated one was only cut, by a time limit mostly, so the value of its
last observation still counts: ``classic/advantages.py`` bootstraps from it. ``environments.py`` reads both flags.

Vector environments reset copies by themselves. Under NEXT_STEP the step after an episode's end is spent on the reset:
its action is ignored, so that step is masked. Under SAME_STEP the observation after the end is already the new
episode's first, and the old one's last is in ``infos["final_obs"]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Episode(NamedTuple):
    """A finished episode."""

    env: int
    """Index of the copy."""
    total_reward: float
    """Undiscounted return."""
    length: int
    """Steps, those that only reset not counted."""


@dataclass(frozen=True)
class Step:
    """One step of B copies."""

    rewards: Tensor
    """[B] float64; 0 where mask is False."""
    terminated: Tensor
    """[B] bool, the episode ended: no value follows."""
    truncated: Tensor
    """[B] bool, the episode was cut: the value of its last observation still counts."""
    mask: Tensor
    """[B] bool, False at steps that only reset, whose action the environment ignored (NEXT_STEP)."""
    final_envs: Tensor
    """[K] copies whose episode ended here and whose next observation is already the new episode's (SAME_STEP)."""
    final_observations: Tensor
    """[K, *O] the last observations of those episodes."""
    episodes: list[Episode]
    """Episodes that ended here."""
    infos: dict[str, Any] = field(default_factory=dict)
    """The vector environment's infos, as Gymnasium gives them: an array per key."""


class RunningEpisodes:
    """The episode that each of B copies is in: whether it starts or resets, its return and its length."""

    def __init__(self, num_envs: int, next_step_autoreset: bool) -> None:
        self.next_step_autoreset = next_step_autoreset
        self.starting = torch.ones(num_envs, dtype=torch.bool)
        """[B] bool, the current observation begins an episode."""
        self.resetting = torch.zeros(num_envs, dtype=torch.bool)
        """[B] bool, the next step only resets, whatever the action."""
        self.returns = np.zeros(num_envs)
        self.lengths = np.zeros(num_envs, dtype=np.int64)

    def advance(self, rewards: np.ndarray, mask: np.ndarray, done: np.ndarray) -> list[Episode]:
        """Count a step in; return the episodes that ended.

        Args:
            rewards: [B], 0 where mask is False.
            mask: [B] bool, False at steps that only reset.
            done: [B] bool, the episode was terminated or truncated.
        """
        self.returns += rewards
        self.lengths += mask
        ended = [self.episode(copy) for copy in np.flatnonzero(done).tolist()]
        self.returns[done] = 0.0
        self.lengths[done] = 0
        over = torch.from_numpy(done)
        if self.next_step_autoreset:
            self.starting, self.resetting = self.resetting, over
        else:
            self.starting = over
        return ended

    def episode(self, copy: int) -> Episode:
        """Return a copy's episode so far."""
        return Episode(copy, float(self.returns[copy]), int(self.lengths[copy]))

    def state(self) -> dict[str, Tensor]:
        """Return what :meth:`load` takes."""
        return {
            "resetting": self.resetting,
            "starting": self.starting,
            "returns": torch.from_numpy(self.returns),
            "lengths": torch.from_numpy(self.lengths),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state."""
        self.resetting, self.starting = state["resetting"], state["starting"]
        self.returns, self.lengths = state["returns"].numpy().copy(), state["lengths"].numpy().copy()


def final_observation(info: dict[str, Any], copy: int) -> Any:
    """Return the last observation of a copy's episode under SAME_STEP; None if the environment lost it."""
    finals = info.get("final_obs")
    return None if finals is None else _row(finals, copy)


def _row(batch: Any, index: int) -> Any:
    """Take one observation: Gymnasium's are an array of objects, others' one batch in the parts of the space."""
    if isinstance(batch, Mapping):
        return {key: _row(part, index) for key, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_row(part, index) for part in batch)
    return batch[index]
