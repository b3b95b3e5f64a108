"""Adapters: environments of actions and observations (Gymnasium's, OpenEnv's) as text environments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlhf_ppo.data.chat import Messages, Prompt
from rlhf_ppo.generation.conversation import Reply
from rlhf_ppo.generation.environments.episodes import Episodes, TextEnvironment
from rlhf_ppo.runtime.side_by_side import settled


class ActionEnvironment:
    """An environment with ``reset()`` and ``step(action)``: each turn of the policy is an action.

    What ``reset`` shows is added to the row's prompt, and is the prompt where the row has none. A row's column ``seed``
    is what the environment is reset with.
    """

    def __init__(
        self,
        make: Callable[[dict[str, Any]], Any],
        *,
        action: Callable[[str], Any] = str,
        text: Callable[[Any], str] | None = None,
        shows_reset: bool = True,
    ) -> None:
        """Set how the environment is made, how text becomes actions, and how observations become text.

        Args:
            make: from the row to the environment. Its ``step`` returns (observation, reward, done), Gymnasium's
                (observation, reward, terminated, truncated, info), or OpenEnv's result with these as attributes; its
                methods may be ``async``.
            action: from a turn's text to an action; raises a ValueError or KeyError if it says none.
            text: from an observation to text; None: observations are text.
            shows_reset: False: the prompt stands for what ``reset`` shows.
        """
        self._make, self._action, self._text, self._shows_reset = make, action, text, shows_reset
        self.invalid_actions = 0
        """Turns that were no action."""

    def reset(self, row: dict[str, Any]) -> Prompt | None:
        """Make and reset the environment; returns the prompt with what it shows."""
        self._environment = self._make(row)
        seed = {} if row.get("seed") is None else {"seed": int(row["seed"])}
        result = settled(self._environment.reset(**seed))
        if not self._shows_reset:
            return None
        observation = result[0] if isinstance(result, tuple) else getattr(result, "observation", result)
        return _with_observation(row.get("prompt"), self._read(observation))

    def step(self, messages: Messages) -> tuple[Reply, float | None, bool]:
        """Act as the last turn says; one that says no action is told so, with reward 0."""
        space: Any = getattr(self._environment, "action_space", None)
        try:
            action = self._action(messages[-1].get("content") or "")
            if type(space).__name__ == "Discrete" and not space.contains(action):
                raise ValueError(f"{action!r} is not in {space}")
        except (ValueError, LookupError) as error:
            self.invalid_actions += 1
            return f"Error: no action: {error}" + ("" if space is None else f"; actions are {space}"), 0.0, False
        observation, reward, done = _outcome(settled(self._environment.step(action)))
        return None if done else self._read(observation), reward, done

    def close(self) -> None:
        """Close the environment, if it can be closed."""
        if hasattr(self._environment, "close"):
            settled(self._environment.close())

    def _read(self, observation: Any) -> str:
        if self._text is not None:
            return self._text(observation)
        if not isinstance(observation, str):
            raise TypeError(
                f"the observation is {type(observation).__name__} {observation!r:.80}, not text: say how to read it, "
                "text=lambda observation: ..."
            )
        return observation


class Environments:
    """One environment with actions and observations per conversation, as ``respond`` and as a reward function.

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
        """Set how environments are made; arguments are those of :class:`ActionEnvironment`.

        ``make`` gets a prompt's messages.
        """
        self.make, self.action, self.text = make, action, text
        self._episodes = Episodes(self._new)

    def _new(self) -> TextEnvironment:
        return ActionEnvironment(
            lambda row: self.make(row["prompt"]),
            action=lambda said: self.action(said),
            text=self.text,
            shows_reset=False,
        )

    def __call__(self, messages: Messages) -> Reply:
        """Step with the policy's last turn and return the observation, or None once the episode is done."""
        episode = self._episodes.of(messages)
        if episode is None:
            episode = self._episodes.new()
            episode.reset({"prompt": messages[:-1]})
        return episode.step(messages)

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
        turns = {"conversations": conversations, "completion_turns": completion_turns}
        return self._episodes(prompts, completions, **turns, **columns)

    def close_episodes(self) -> None:
        """Close the episodes still open; called when a rollout is over, or has failed."""
        self._episodes.close_episodes()


def gymnasium_environment(
    name: str,
    *,
    action: Callable[[str], Any] | None = None,
    text: Callable[[Any], str] | None = None,
    **options: Any,
) -> Callable[[], TextEnvironment]:
    """Return what makes text environments of a registered Gymnasium environment, for ``PPOTrainer(environment=...)``.

    Args:
        name: its id, for ``gymnasium.make``.
        action: from a turn's text to an action; needed unless the action space is Text.
        text: from an observation to text; needed unless the observation space is Text.
        options: further arguments of ``gymnasium.make``.
    Raises:
        ValueError: there is no such environment, or a space is not Text and nothing translates it.
    """
    import gymnasium

    try:
        made = gymnasium.make(name, **options)
    except gymnasium.error.Error as error:
        raise ValueError(f"gymnasium environment {name!r} cannot be made: {error}") from error
    spaces = {"action": (made.action_space, action), "text": (made.observation_space, text)}
    made.close()
    for argument, (space, translate) in spaces.items():
        if translate is None and not isinstance(space, gymnasium.spaces.Text):
            kind = "action" if argument == "action" else "observation"
            raise ValueError(
                f"gymnasium environment {name!r} has the {kind} space {space}, not Text: say how to translate it, "
                f"gymnasium_environment({name!r}, {argument}=lambda {'said' if kind == 'action' else kind}: ...)"
            )
    return lambda: ActionEnvironment(lambda row: gymnasium.make(name, **options), action=action or str, text=text)


def openenv_environment(
    client: str | Callable[[], Any],
    *,
    action: Callable[[str], Any] = lambda said: {"message": said},
    text: Callable[[Any], str] | None = None,
) -> Callable[[], TextEnvironment]:
    """Return what makes text environments of an OpenEnv server, for ``PPOTrainer(environment=...)``.

    Each conversation is a session of its own, so the server needs ``max_concurrent_envs`` of at least the rollout's
    size.

    Args:
        client: the server's address, or what makes a client, such as ``lambda: EchoEnv(base_url=...)``.
        action: from a turn's text to an action; the default fits servers whose action has one field, "message".
        text: from an observation (a dict, with an address) to text; None: it is text.
    Raises:
        ValueError: ``client`` is an address, and openenv is not installed.
    """
    if callable(client):
        return lambda: ActionEnvironment(lambda row: client(), action=action, text=text)
    try:
        from openenv.core import GenericEnvClient  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"openenv_environment({client!r}) needs the package openenv: pip install 'rlhf-ppo[openenv]'"
        ) from error
    return openenv_environment(lambda: GenericEnvClient(base_url=client), action=action, text=text)


def _with_observation(prompt: Prompt | None, observation: str) -> Prompt:
    """Return the prompt followed by an observation: in the last message, if that is the user's."""
    if isinstance(prompt, str):
        return prompt + observation
    messages = [dict(message) for message in prompt or ()]
    if messages and messages[-1]["role"] == "user" and isinstance(messages[-1].get("content"), str):
        last = messages.pop()
        return [*messages, {**last, "content": f"{last['content']}\n\n{observation}"}]
    return [*messages, {"role": "user", "content": observation}]


def _outcome(result: Any) -> tuple[Any, float | None, bool]:
    """Read (observation, reward, done) from what ``step`` returned."""
    if isinstance(result, tuple):
        if len(result) in (3, 5):
            observation, reward, *ends = result[:4]
            return observation, reward, any(map(bool, ends))
    elif hasattr(result, "observation") and hasattr(result, "reward"):
        ends = (getattr(result, name, False) for name in ("done", "terminated", "truncated"))
        return result.observation, result.reward, any(map(bool, ends))
    raise TypeError(
        "step must return (observation, reward, done), (observation, reward, terminated, truncated, info) or a result "
        f"with observation, reward and done, got {type(result).__name__} {result!r:.80}"
    )
