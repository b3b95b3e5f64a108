"""Callbacks: functions called after each update with the agent and its metrics; one that returns True ends training.

Steps and episodes have hooks of their own, ``learn(on_step=..., on_episode=...)`` (:mod:`classic.play_hooks`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from classic.config import PPOArgs
from classic.envs.environments import Episode
from classic.envs.make_env import EnvLike

Callback = Callable[[Any, Mapping[str, float]], "bool | None"]
"""A function of the agent and its metrics; it decides by the agent's counters alone, so that a resumed run calls it
when the run that never stopped did."""


class Agent(Protocol):
    """What the callbacks here read and call of :class:`classic.PPO`."""

    args: PPOArgs
    counters: dict[str, int]
    recent: deque[Episode]
    best_return: float | None

    def evaluate(self, episodes: int = 20, *, env: EnvLike | None = None) -> dict[str, float]: ...
    def log(self, metrics: Mapping[str, float]) -> None: ...
    def save(self, folder: str | Path) -> Path: ...


def run_callbacks(callbacks: Sequence[Callback], agent: Any, metrics: Mapping[str, float]) -> bool:
    """Call all of them; return whether any wants training to end."""
    return any([bool(callback(agent, metrics)) for callback in callbacks])  # noqa: C419 - the others are called too


def every_steps(steps: int, callback: Callback) -> Callback:
    """Call another callback after the update in which training passes a multiple of so many environment steps.

    Raises:
        ValueError: less than one step.
    """
    if steps < 1:
        raise ValueError(f"every_steps: steps must be 1 or more, got {steps}")

    def call(agent: Agent, metrics: Mapping[str, float]) -> bool | None:
        done = agent.counters["env_steps"]
        before = done - agent.counters.get("rollout_steps", 0)
        return callback(agent, metrics) if done // steps > before // steps else None

    return call


def evaluate_every(
    rollouts: int, *, episodes: int = 20, keep_best: bool = True, envs: Mapping[str, EnvLike] | None = None
) -> Callback:
    """Evaluate every few rollouts: ``eval/...`` in metrics.jsonl, the best agent in ``<output_dir>/best``.

    Args:
        rollouts: between two evaluations.
        episodes: of each.
        keep_best: save the best agent, by its mean return on training's environment.
        envs: name -> other environments to evaluate on, logged as ``eval_<name>/...``.
    Raises:
        ValueError: less than one rollout or episode.
    """
    for name, value in (("rollouts", rollouts), ("episodes", episodes)):
        if value < 1:
            raise ValueError(f"evaluate_every: {name} must be 1 or more, got {value}")

    def evaluate(agent: Agent, metrics: Mapping[str, float]) -> None:
        if agent.counters["iteration"] % rollouts:
            return
        result = agent.evaluate(episodes=episodes)
        row = {f"eval/{name}": value for name, value in result.items()}
        for name, env in (envs or {}).items():
            there = agent.evaluate(episodes=episodes, env=env)
            row |= {f"eval_{name}/{key}": value for key, value in there.items()}
        agent.log(row)
        if agent.best_return is None or result["mean_return"] > agent.best_return:
            agent.best_return = result["mean_return"]
            if keep_best and agent.args.output_dir is not None:
                agent.save(Path(agent.args.output_dir) / "best")

    return evaluate


def save_every(rollouts: int, folder: str | Path) -> Callback:
    """Save the agent into ``<folder>/<iteration>`` every few rollouts, to look at later.

    Checkpoints, which a run resumes from, are written by the setting ``save_every``.
    """
    if rollouts < 1:
        raise ValueError(f"save_every: rollouts must be 1 or more, got {rollouts}")

    def save(agent: Agent, metrics: Mapping[str, float]) -> None:
        if agent.counters["iteration"] % rollouts == 0:
            agent.save(Path(folder) / str(agent.counters["iteration"]))

    return save


def stop_at_return(threshold: float, *, episodes: int = 100) -> Callback:
    """End training once the mean return of the last ``episodes`` (at most 100) episodes reaches a threshold."""
    if not 1 <= episodes <= 100:
        raise ValueError(f"stop_at_return: episodes must be between 1 and 100, got {episodes}")

    def stop(agent: Agent, metrics: Mapping[str, float]) -> bool:
        last = list(agent.recent)[-episodes:]
        return len(last) == episodes and sum(episode.total_reward for episode in last) / episodes >= threshold

    return stop
