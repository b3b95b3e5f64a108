"""Episodes: one environment per conversation, which opens it, answers the policy's turns and rewards them."""

from __future__ import annotations

import concurrent.futures
import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rlhf_ppo.data.chat import Messages, Prompt, is_chat
from rlhf_ppo.generation.conversation import Reply
from rlhf_ppo.runtime.files import plain_json
from rlhf_ppo.runtime.side_by_side import Calls, settled

CLOSE_S = 10.0
"""Seconds in which environments must close; those that do not are left behind."""


class TextEnvironment(Protocol):
    """What one conversation is held with. Each conversation has an instance of its own; methods may be ``async``.

    Conversations run side by side, each of these calls in a thread or on an event loop: what several instances share
    must allow that. If there is a method ``close()``, it is called once, when the episode is done or the rollout is
    over.
    """

    def reset(self, row: dict[str, Any]) -> Prompt | None:
        """Begin.

        Args:
            row: the data set's row, all its columns.
        Returns:
            The prompt, as messages or text. None: the row's own ``prompt``, which may otherwise be missing.
        """
        ...

    def step(self, messages: Messages) -> tuple[Reply, float | None, bool]:
        """Answer the policy's turn, which is ``messages[-1]``.

        Returns:
            (reply, reward, done): what the policy reads before its next turn; the turn's reward, which goes on its
            last token (None: 0); and whether the conversation is over, so that the reply is not used.
        """
        ...


class WrongAnswerError(TypeError):
    """An environment returned something of another kind than it must; the message begins behind the method's name."""


class Episode:
    """One conversation's environment, and what it has rewarded."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._environment: Any = None
        self._closed, self._lock = False, threading.Lock()
        self.doing = f"{getattr(make, '__name__', type(make).__name__)}()"
        """The call that runs, or ran last, as messages name it."""
        self.messages: Messages | None = None
        """The conversation's own list, from the first step on."""
        self.rewards: list[float] = []
        """One per turn."""
        self.invalid_actions: int | None = None
        """How many turns were no action; None where the environment does not count."""

    def reset(self, row: dict[str, Any]) -> Prompt:
        """Make the environment and let it begin; returns the prompt."""
        self._environment = environment = self._make()
        if self._closed:  # the rollout has failed meanwhile, and this call was abandoned
            self.close()
            raise concurrent.futures.CancelledError
        name = type(environment).__name__
        if lacks := missing_methods(environment):
            raise WrongAnswerError(f"returned {name}, which has no method {lacks}: an environment has reset and step")
        self.doing = f"{name}.reset"
        prompt = settled(environment.reset(row))
        if prompt is None and row.get("prompt") is None:
            raise WrongAnswerError("returned None, which means the row's own prompt, but the row has none")
        prompt = row["prompt"] if prompt is None else prompt
        if (isinstance(prompt, str) and prompt) or is_chat(prompt):
            try:
                return plain_json(prompt)
            except ValueError as error:
                raise WrongAnswerError(f"must return what JSON can hold ({error})") from None
        raise WrongAnswerError(
            f"must return messages or text, or None for the row's own prompt; it returned {_shown(prompt)}"
        )

    def step(self, messages: Messages) -> Reply:
        """Let the environment answer the last turn, and note its reward; returns None once the episode is done."""
        self.messages = messages
        self.doing = f"{type(self._environment).__name__}.step"
        outcome = settled(self._environment.step(messages))
        if not isinstance(outcome, tuple) or len(outcome) != 3:
            raise WrongAnswerError(f"must return (reply, reward, done); it returned {_shown(outcome)}")
        reply, reward, done = outcome
        self.invalid_actions = getattr(self._environment, "invalid_actions", None)
        self.rewards.append(_number(reward))
        if done:
            self.close()
            return None
        if reply is None:
            raise WrongAnswerError("returned no reply (None), although done is false: reply, or return done=True")
        return reply

    def close(self) -> None:
        """Close the environment, if it is open and can be closed; one that is made later is closed at once."""
        with self._lock:
            self._closed = True
            environment, self._environment = self._environment, None
        if hasattr(environment, "close"):
            settled(environment.close())

    @property
    def is_open(self) -> bool:
        """Whether there is something to close."""
        return hasattr(self._environment, "close")


def missing_methods(environment: Any) -> str:
    """Return the methods that an environment, or its class, lacks, as words; "" if it has all."""
    return " and no ".join(name for name in ("reset", "step") if not callable(getattr(environment, name, None)))


def require_environment(make: Any) -> None:
    """Raise a ValueError if ``make`` cannot make environments: it must be a class or function without arguments."""
    name = getattr(make, "__name__", type(make).__name__)
    if not callable(make):
        what = "an environment itself" if not missing_methods(make) else f"{_shown(make)}"
        raise ValueError(
            f"environment must be a class, or a function that makes one for each conversation, but it is {what}: pass "
            f"the class, or lambda: {name}(...)"
        )
    if isinstance(make, type) and (lacks := missing_methods(make)):
        raise ValueError(f"environment {name} has no method {lacks}: see rlhf_ppo.TextEnvironment")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise ValueError(
            f"environment {name} is made without arguments, once for each conversation, but takes "
            f"{inspect.signature(make)} ({error}): give them defaults, or pass lambda: {name}(...)"
        ) from None
    except ValueError:  # some classes written in C have no signature
        pass


class Episodes:
    """The episodes of a rollout. Called as a reward function, it returns what they were rewarded."""

    __name__ = "environment"
    """The reward's name in metrics and samples."""
    whole_rollout = False
    """As a reward function: each process scores its own conversations, whose environments it has."""

    def __init__(self, make: Callable[[], Any]) -> None:
        """Set how environments are made."""
        self.make = make
        self._episodes: list[Episode] = []

    def new(self) -> Episode:
        """Return a new episode, whose environment ``reset`` will make."""
        episode = Episode(self.make)
        self._episodes.append(episode)
        return episode

    def of(self, messages: Messages) -> Episode | None:
        """Return the episode of a conversation that has begun."""
        return next((episode for episode in self._episodes if episode.messages is messages), None)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        conversations: Sequence[Messages],
        completion_turns: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[list[float]]:
        """Return the reward that ``step`` gave for each turn, on its last token; log how many were no action."""
        episodes = {id(episode.messages): episode for episode in self._episodes}
        scores: list[list[float]] = []
        invalid = [None if (one := episodes.get(id(m))) is None else one.invalid_actions for m in conversations]
        counts = [count for count in invalid if count is not None]
        if counts and (log_metric := columns.get("log_metric")) is not None:
            log_metric("invalid_actions_per_response", sum(counts) / len(counts))
        for messages, turns in zip(conversations, completion_turns, strict=True):
            if (episode := episodes.get(id(messages))) is None:
                raise LookupError("this conversation does not belong to these Environments: pass them as respond, too")
            ends = [i + 1 == len(turns) or turns[i + 1] != turn for i, turn in enumerate(turns)]
            scores.append([episode.rewards[turn] if last else 0.0 for turn, last in zip(turns, ends, strict=True)])
        return scores

    def close_episodes(self) -> None:
        """Close the environments still open, side by side; called when a rollout is over, or has failed."""
        episodes, self._episodes = self._episodes, []
        calls = Calls()
        closing = [calls.start(episode.close) for episode in episodes if episode.is_open]
        for episode in episodes:  # those that are still being made must not stay
            if not episode.is_open:
                episode.close()
        concurrent.futures.wait([call.future for call in closing], timeout=CLOSE_S)
        for call in closing:
            error = call.future.exception() if call.future.done() else TimeoutError(f"no end after {CLOSE_S:g} seconds")
            if error is not None:
                warnings.warn(f"an environment could not be closed: {type(error).__name__}: {error}", stacklevel=2)
        calls.abandon()


def _number(reward: Any) -> float:
    """Return a reward as a number; None counts as 0."""
    if reward is None:
        return 0.0
    try:
        if not isinstance(reward, (str, bytes)):
            return float(reward)
    except (TypeError, ValueError):
        pass
    raise WrongAnswerError(f"must return a number as reward, or None; it returned {_shown(reward)}")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.80}"
