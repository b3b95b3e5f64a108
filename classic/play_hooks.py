"""Hooks while rollouts are played: after each step, after each episode, and a line of episodes.jsonl for each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from classic.envs.environments import Environments
from classic.envs.truncation import Step
from classic.episodes import EPISODES
from rlhf_ppo.runtime.logs.run_directory import RunDirectory

StepHook = Callable[[Any, Step], "bool | None"]
"""A function of the agent and a step of all copies (rewards, ends, infos); True: training ends with this rollout."""

EpisodeHook = Callable[[Any, dict[str, Any]], "bool | None"]
"""A function of the agent and a finished episode, as episodes.jsonl has it; True: training ends with this rollout."""


class PlayHooks:
    """Call the user's functions while a call of learn plays, and write its episodes down.

    Args:
        agent: what they are called with.
        on_step, on_episode: the functions; None: none.
        info_keys: what to keep of an episode's last infos.
    """

    def __init__(
        self, agent: Any, on_step: StepHook | None, on_episode: EpisodeHook | None, info_keys: Sequence[str]
    ) -> None:
        self.agent, self.on_step, self.on_episode, self.info_keys = agent, on_step, on_episode, info_keys
        self.began = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.stop = False
        """Whether a function wants training to end."""

    @property
    def called(self) -> bool:
        """Whether the user's functions are called, which may change anything."""
        return self.on_step is not None or self.on_episode is not None

    def begin(self, envs: Environments, counters: dict[str, int], folder: RunDirectory | None) -> Any:
        """Begin a rollout; return what is called with each of its steps, or None if there is nothing to do."""
        self.rows, self.same_step = [], not envs.next_step_autoreset
        self.iteration, self.env_steps = counters["iteration"] + 1, counters["env_steps"]
        self.copies, self.resetting = envs.num_envs, int(envs.resetting.sum())
        return self._step if folder is not None or self.called else None

    def _step(self, step: Step) -> None:
        self.env_steps += self.copies - self.resetting
        self.resetting = 0 if self.same_step else len(step.episodes)
        infos = step.infos.get("final_info", {}) if self.same_step else step.infos
        for episode in step.episodes:
            row = {
                "iteration": self.iteration,
                "env_steps": self.env_steps,
                "seconds": round(time.perf_counter() - self.began, 3),
                "env": episode.env,
                "return": episode.total_reward,
                "length": episode.length,
                **_infos(infos, episode.env, self.info_keys),
            }
            self.rows.append(row)
            if self.on_episode is not None and self.on_episode(self.agent, row):
                self.stop = True
        if self.on_step is not None and self.on_step(self.agent, step):
            self.stop = True

    def write(self, folder: RunDirectory | None) -> None:
        """Append the rollout's episodes to the run's file."""
        if folder is not None and self.rows:
            with (folder.path / EPISODES).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, default=str) + "\n" for row in self.rows)


def _infos(infos: Any, copy: int, keys: Sequence[Any]) -> dict[str, Any]:
    """Return what a copy's infos have of the keys; a vector environment says in ``_<key>`` which copies have one."""
    found = {}
    for key in keys:
        given = infos.get(f"_{key}")
        if key in infos and (given is None or given[copy]):
            found[str(key)] = _of(infos[key], copy)
    return found


def _of(values: Any, copy: int) -> Any:
    """Return a copy's value; those of dicts are a dict of every copy's, and so on."""
    if isinstance(values, Mapping):
        return _infos(values, copy, [key for key in values if not str(key).startswith("_")])
    value = values[copy]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
