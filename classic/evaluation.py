"""Evaluate a policy: whole episodes, shared out in advance so that short ones are not favoured, of bounded length."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from classic.config import filled
from classic.envs.environments import Environments, Episode
from classic.envs.make_env import EnvLike
from classic.envs.seeds import derive_seeds
from classic.networks.actor_critic import ActorCritic
from classic.state import Run, TrainState, describe_spaces, make_copies
from rlhf_ppo.runtime.machine.signals import stop_if_asked

MAX_COPIES = 32
KEPT = 8
"""Environments whose copies are kept; functions written at each call would pile up."""
MAX_STEPS = 10_000
"""Steps of an episode that neither the environment nor a setting limits."""


def max_episode_steps(run: Run) -> int:
    """Return the steps after which an episode of an evaluation or a video is cut."""
    return run.args.eval_max_steps or max(MAX_STEPS, run.envs.time_limit() or 0)


class EvaluationCopies:
    """Environments to evaluate on, made once and kept."""

    def __init__(self) -> None:
        self._envs: dict[Any, Environments] = {}
        """Whether it is training's own (with env_kwargs), and environment as it was given -> its copies."""

    @contextmanager
    def lend(self, run: Run, state: TrainState, episodes: int, env: EnvLike | None = None) -> Iterator[Environments]:
        """Lend copies for an evaluation: training's own if there is only one environment or training has not begun.

        Args:
            run, state: the agent's.
            episodes: at most as many copies.
            env: another environment than training's; None: that.
        """
        if episodes < 1:
            raise ValueError(f"episodes must be 1 or more, got {episodes}")
        wanted = min(episodes, run.args.eval_envs or min(run.envs.num_envs, MAX_COPIES))
        fresh = not state.playing and wanted == run.envs.num_envs and not run.args.training_wrappers
        if env is None and (isinstance(run.env, gymnasium.Env) or fresh):
            try:
                yield run.envs
            finally:
                state.playing = False
            return
        if isinstance(env, gymnasium.Env):
            wanted = 1
        key = env is None, run.env if env is None else env
        # Another number of copies would play other episodes.
        if key in self._envs and self._envs[key].num_envs != wanted:
            self._envs.pop(key).close()
        if key not in self._envs:
            self._envs[key] = self._made(run, env, wanted)
            functions = [k for k in self._envs if k != key and callable(k[1])]
            for old in functions[: max(0, len(functions) - KEPT + 1)]:
                self._envs.pop(old).close()
        try:
            yield self._envs[key]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the environments."""
        while self._envs:
            self._envs.popitem()[1].close()

    @staticmethod
    def _made(run: Run, env: EnvLike | None, wanted: int) -> Environments:
        if env is None:
            return make_copies(run.env, run.args, wanted, filled(run.args.wrappers))
        args = replace(run.args, env_kwargs=None)  # which are for training's
        made = make_copies(env, args, 1 if isinstance(env, gymnasium.Env) else wanted, filled(args.wrappers))
        if describe_spaces(made) != describe_spaces(run.envs):
            made.close()
            raise ValueError(
                f"the agent plays {run.env_id!r} with the spaces {describe_spaces(run.envs)}, but {made.env_id!r} has "
                f"{describe_spaces(made)}: evaluate it on an environment with its own"
            )
        return made


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
