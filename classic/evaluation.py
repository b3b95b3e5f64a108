"""Evaluate a policy: whole episodes, shared out in advance so that short ones are not favoured, of bounded length."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gymnasium
import numpy as np
import torch
from torch import Tensor

from classic.envs.environments import Environments, Episode
from classic.envs.seeds import derive_seeds
from classic.networks.actor_critic import ActorCritic
from classic.state import Run, TrainState, make_copies
from rlhf_ppo.runtime.signals import stop_if_asked

MAX_COPIES = 32
MAX_STEPS = 10_000
"""Steps of an episode that neither the environment nor a setting limits."""


def max_episode_steps(run: Run) -> int:
    """Return the steps after which an episode of an evaluation or a video is cut."""
    return run.args.eval_max_steps or max(MAX_STEPS, run.envs.time_limit() or 0)


class EvaluationCopies:
    """Environments to evaluate on, made once and kept."""

    def __init__(self) -> None:
        self._envs: Environments | None = None

    @contextmanager
    def lend(self, run: Run, state: TrainState, episodes: int) -> Iterator[Environments]:
        """Lend copies for an evaluation: training's own if there is only one environment or training has not begun."""
        if episodes < 1:
            raise ValueError(f"episodes must be 1 or more, got {episodes}")
        wanted = min(episodes, run.args.eval_envs or min(run.envs.num_envs, MAX_COPIES))
        if isinstance(run.env, gymnasium.Env) or (not state.playing and wanted == run.envs.num_envs):
            try:
                yield run.envs
            finally:
                state.playing = False
            return
        # Another number of copies would play other episodes.
        if self._envs is not None and self._envs.num_envs != wanted:
            self.close()
        self._envs = envs = self._envs or make_copies(run.env, run.args, wanted)
        try:
            yield envs
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the environments."""
        if self._envs is not None:
            self._envs.close()
        self._envs = None


def evaluate_policy(
    envs: Environments,
    network: ActorCritic,
    episodes: int,
    *,
    deterministic: bool,
    seed: int,
    view: Callable[[Tensor], Tensor],
    max_steps: int,
) -> dict[str, float]:
    """Compute mean and standard deviation of the undiscounted return over ``episodes`` episodes.

    Each copy plays a share fixed in advance; taking the first episodes to finish would favour short ones. A copy whose
    episode is cut waits until no copy with episodes left is playing; then all are reset.

    Args:
        envs: at most as many copies as episodes.
        network: the policy.
        episodes: how many.
        deterministic: take the most likely action instead of a sampled one.
        seed: of the environments and the draws.
        view: normalises observations, without updating the statistics.
        max_steps: steps after which an episode is cut; its return so far counts.
    Returns:
        mean_return, std_return (population) and mean_length in steps.
    Warns:
        UserWarning: episodes were cut.
    Raises:
        BrokenEnvironmentError: see :class:`Environments`.
        Interrupted: a signal came while a run listens for them.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    generator = None if deterministic else torch.Generator().manual_seed(derive_seeds(seed, "prediction", 1)[0])
    owed = np.array([(episodes + i) // envs.num_envs for i in range(envs.num_envs)])
    playing = np.zeros(envs.num_envs, dtype=bool)
    finished: list[Episode] = []
    beginnings = cut = 0
    state = None
    while owed.any():
        if not (playing & (owed > 0)).any():
            envs.reset(seed, "evaluation", begun=beginnings)
            state = network.initial_state(envs.num_envs)
            playing[:] = True
            beginnings += 1
        stop_if_asked()
        actions, _, state = network.act(
            view(envs.observations), generator, action_masks=envs.action_masks, starts=envs.starting, state=state
        )
        over = [episode for episode in envs.step(actions).episodes if playing[episode.env]]
        too_long = np.flatnonzero(playing & (envs.lengths >= max_steps))
        cut += int((owed[too_long] > 0).sum())
        playing[too_long] = False
        for episode in [*over, *map(envs.running_episode, too_long.tolist())]:
            if owed[episode.env]:
                owed[episode.env] -= 1
                finished.append(episode)
    if cut:
        warn_of_cut(envs, cut, episodes, max_steps)
    returns = [episode.total_reward for episode in finished]
    return {
        "mean_return": float(np.mean(returns)),
        "std_return": float(np.std(returns)),
        "mean_length": float(np.mean([episode.length for episode in finished])),
    }


def warn_of_cut(envs: Environments, cut: int, episodes: int, max_steps: int) -> None:
    """Warn of cut episodes, and say which limit was missing."""
    limit = envs.time_limit()
    own = "has no time limit of its own (max_episode_steps)" if limit is None else f"has its own at {limit:,} steps"
    warnings.warn(
        f"{cut} of {episodes} episodes were cut after {max_steps:,} steps (eval_max_steps) and count with their "
        f"return so far: environment {envs.env_id!r} {own}",
        stacklevel=4,
    )
