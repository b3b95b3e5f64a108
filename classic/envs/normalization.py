"""Normalise observations and rewards by running statistics, which are the agent's and saved with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LIMIT = 10.0
"""Normalised values are clipped to +- this."""


class RunningStatistics:
    """Mean and variance of all rows so far, in float64.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.count = 0.0
        self.mean, self.variance = np.zeros(shape), np.ones(shape)

    def update(self, batch: np.ndarray) -> None:
        """Count a batch [N, *shape] in; an empty one changes nothing."""
        count = len(batch)
        if not count:
            return
        mean, variance = batch.mean(axis=0, dtype=np.float64), batch.var(axis=0, dtype=np.float64)
        total = self.count + count
        gap, share = mean - self.mean, count / total
        self.variance = (1 - share) * self.variance + share * variance + (1 - share) * share * gap**2
        self.mean = self.mean + share * gap
        self.count = total

    def state(self) -> dict[str, Tensor]:
        """Return what :meth:`load` takes, bit for bit."""
        values = {"count": np.array(self.count), "mean": self.mean, "variance": self.variance}
        return {name: torch.from_numpy(np.array(value, dtype=np.float64)) for name, value in values.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""
        self.count = float(state["count"])
        self.mean, self.variance = state["mean"].numpy().copy(), state["variance"].numpy().copy()


class Normalizer:
    """Scale observations to mean 0 and variance 1; divide rewards by the standard deviation of the discounted return.

    Statistics change only in :meth:`observe` and :meth:`scale_rewards`, which training calls. Steps that only reset are
    left out, so both autoreset modes give the same numbers. A discounted sum starts again with each episode.

    Args:
        observation_shape: (O,), or None to leave observations alone.
        num_envs: copies whose rewards are scaled, or None to leave rewards alone.
        gamma: discount of the returns.
        pixels: [O] bool, True for numbers that stay as they are, from 0 to 1; None: there are none.
    """

    def __init__(
        self,
        observation_shape: tuple[int, ...] | None,
        num_envs: int | None,
        gamma: float,
        pixels: np.ndarray | None = None,
    ) -> None:
        self.observations = None if observation_shape is None else RunningStatistics(observation_shape)
        self.returns = None if num_envs is None else RunningStatistics()
        self.num_envs, self.gamma, self.pixels = num_envs or 0, gamma, pixels
        self.begin_episodes()

    def observe(self, observations: Tensor, mask: Tensor) -> Tensor:
        """Count in the rows [B, O] where mask [B] is True, then normalise all."""
        if self.observations is not None:
            self.observations.update(observations[mask].numpy())
        return self.normalize(observations)

    def normalize(self, observations: Tensor) -> Tensor:
        """Normalise [N, O] with the current statistics, to float32; the mean is subtracted in float64."""
        if self.observations is None:
            return observations.float() if observations.dtype == torch.float64 else observations
        spread = np.sqrt(self.observations.variance + 1e-8)
        scaled = (observations.numpy() - self.observations.mean) / spread
        if self.pixels is not None:
            scaled[:, self.pixels] = observations.numpy()[:, self.pixels]
        return torch.from_numpy(scaled.clip(-LIMIT, LIMIT).astype(np.float32))

    def scale_rewards(self, rewards: Tensor, done: Tensor, mask: Tensor) -> Tensor:
        """Count in the discounted returns so far, then divide the rewards [B] by their standard deviation.

        Args:
            rewards: [B].
            done: [B] bool, the episode was terminated or truncated here.
            mask: [B] bool, False at steps that only reset.
        """
        if self.returns is None:
            return rewards
        real = mask.numpy()
        self.sums = np.where(real, self.sums * self.gamma + rewards.numpy(), self.sums)
        self.returns.update(self.sums[real])
        self.sums[done.numpy()] = 0.0
        scaled = rewards.numpy() / np.sqrt(self.returns.variance + 1e-8)
        return torch.from_numpy(scaled.clip(-LIMIT, LIMIT).astype(np.float32))

    def begin_episodes(self) -> None:
        """Drop the sums of running episodes: every copy begins a new one."""
        self.sums = np.zeros(self.num_envs)

    def state(self) -> dict[str, Tensor]:
        """Return what :meth:`load` takes, bit for bit."""
        parts = {"observations": self.observations, "returns": self.returns}
        state = {f"{p}.{n}": x for p, s in parts.items() if s is not None for n, x in s.state().items()}
        return {**state, "sums": torch.from_numpy(self.sums.copy())}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""
        for part, statistics in (("observations", self.observations), ("returns", self.returns)):
            if statistics is not None:
                own = {name.removeprefix(f"{part}."): x for name, x in state.items() if name.startswith(f"{part}.")}
                statistics.load(own)
        self.sums = state["sums"].numpy().copy()
