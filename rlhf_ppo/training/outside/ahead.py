"""Rollouts ahead: sample the next rollout while the update on this one runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.training.rollouts.collect import next_draws, next_prompts
from rlhf_ppo.training.rollouts.generate import start_generating
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState


class _Started(NamedTuple):
    """A rollout that is being sampled."""

    place: tuple[int, int]
    """For which update it is, and the number of its draws."""
    version: int
    """Updates that its policy has had."""
    finish: Callable[[], Rollout]


class RolloutsAhead:
    """The next rollout's responses, sampled in a thread (``rollouts_ahead``) or when they are asked for.

    One that is being sampled when a run ends is lost: a run that resumes samples it again, with the policy of then.
    """

    def __init__(self) -> None:
        self._started: _Started | None = None

    def next(self, state: TrainState, run: Run) -> Rollout:
        """Return the responses that the next update learns from; those that were meant for another are left."""
        started, self._started = self._started, None
        if started is None or started.place != (state.iteration, state.rollouts_made):
            started = self._start(state, run, updates=0, ahead=False)
        rollout = started.finish()
        if run.engine is None:
            return rollout
        late = torch.full((len(rollout.prompts),), state.iteration - started.version, device=run.device)
        return dataclasses.replace(rollout, staleness=late)

    def start(self, state: TrainState, run: Run) -> None:
        """Begin to sample the rollout after the one that was sampled and scored, if settings and run want it."""
        if run.args.rollouts_ahead and state.iteration + 1 < run.args.num_rollouts:
            self._started = self._start(state, run, updates=1, ahead=True)

    def _start(self, state: TrainState, run: Run, *, updates: int, ahead: bool) -> _Started:
        """Start a rollout for the update after ``updates`` more."""
        place = (state.iteration + updates, state.rollouts_made)
        prompts, draws = next_prompts(run, place[0], state.extra_prompts), next_draws(run, state)
        return _Started(place, state.iteration, start_generating(run, state.model, prompts, draws, ahead=ahead))
