"""Text environments (OpenEnv clients, Gymnasium-like objects): they reply to the policy's turns and reward them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_ppo.data.chat import Messages


@dataclass
class _Episode:
    messages: Messages
    """The conversation's own list; holding it keeps its id from being reused."""
    environment: Any
    rewards: list[float] = field(default_factory=list)
    """One per turn."""


class Environments:
    """One environment per conversation: it replies to the policy's turns, and rewards each on its last token.

    ``PPOTrainer(..., respond=environments, reward_funcs=environments.reward)``, with ``max_turns`` above 1. Each turn
    of the policy is one action; the observation is the reply. The prompt stands for what ``reset`` shows.
    """

    def __init__(
        self,
        make: Callable[[Messages], Any],
        *,
        action: Callable[[str], Any] = str,
        text: Callable[[Any], str] | None = None,
    ) -> None:
        """Set how environments are made, how text becomes actions, and how observations become text.

        Args:
            make: from a prompt's messages to an environment with ``reset()`` and ``step(action)``. ``step`` returns
                (observation, reward, done), Gymnasium's (observation, reward, terminated, truncated, info), or
                OpenEnv's result with these as attributes. Of an OpenEnv client take the synchronous side:
                ``lambda prompt: EchoEnv(base_url=...).sync()``.
            action: from a turn's text to an action, such as ``lambda text: EchoAction(message=text)``.
            text: from an observation to text; None: observations are text.
        """
        self.make, self.action, self.text = make, action, text
        self._episodes: dict[int, _Episode] = {}

    def __call__(self, messages: Messages) -> str | None:
        """Step with the policy's last turn and return the observation, or None once the episode is done."""
        episode = self._episodes.get(id(messages))
        if episode is None:
            episode = self._episodes[id(messages)] = _Episode(messages, self.make(messages[:-1]))
            _synchronous(episode.environment.reset())
        observation, reward, done = _outcome(episode.environment.step(self.action(messages[-1]["content"])))
        episode.rewards.append(reward)
        if done:
            _close(episode)
            return None
        if self.text is not None:
            return self.text(observation)
        if not isinstance(observation, str):
            raise TypeError(
                f"the observation is {type(observation).__name__} {observation!r:.80}, not text: say how to read it, "
                "Environments(..., text=lambda observation: ...)"
            )
        return observation

    def reward(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        conversations: Sequence[Messages],
        completion_turns: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[list[float]]:
        """Return the reward that ``step`` gave for each turn, on its last token (this is a reward function)."""
        scores: list[list[float]] = []
        for messages, turns in zip(conversations, completion_turns, strict=True):
            rewards = self._end(messages)
            ends = [i + 1 == len(turns) or turns[i + 1] != turn for i, turn in enumerate(turns)]
            scores.append([rewards[turn] if last else 0.0 for turn, last in zip(turns, ends, strict=True)])
        return scores

    def close_episodes(self) -> None:
        """Close the episodes still open; called when a rollout is over, or has failed."""
        episodes, self._episodes = list(self._episodes.values()), {}
        for episode in episodes:
            try:
                _close(episode)
            except Exception as error:  # close the others all the same
                warnings.warn(f"an environment could not be closed: {type(error).__name__}: {error}", stacklevel=2)

    def _end(self, messages: Messages) -> list[float]:
        episode = self._episodes.pop(id(messages), None)
        if episode is None:
            raise LookupError("this conversation does not belong to these Environments: pass them as respond, too")
        _close(episode)
        return episode.rewards


def _outcome(result: Any) -> tuple[Any, float, bool]:
    """Read (observation, reward, done) from what ``step`` returned; an OpenEnv reward of None counts as 0."""
    result = _synchronous(result)
    if isinstance(result, tuple):
        if len(result) in (3, 5):
            observation, reward, *ends = result[:4]
            return observation, float(reward or 0), any(map(bool, ends))
    elif hasattr(result, "observation") and hasattr(result, "reward"):
        ends = (getattr(result, name, False) for name in ("done", "terminated", "truncated"))
        return result.observation, float(result.reward or 0), any(map(bool, ends))
    raise TypeError(
        "step must return (observation, reward, done), (observation, reward, terminated, truncated, info) or a result "
        f"with observation, reward and done, got {type(result).__name__} {result!r:.80}"
    )


def _synchronous(result: Any) -> Any:
    """Return the result, or refuse an awaitable one."""
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()  # nobody will await it
        raise TypeError("this environment is asynchronous: let make return its synchronous side, such as client.sync()")
    return result


def _close(episode: _Episode) -> None:
    environment, episode.environment = episode.environment, None
    if hasattr(environment, "close"):
        environment.close()
