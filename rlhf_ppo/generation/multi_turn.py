"""Multi-turn: conversations of the policy with an environment, side by side, each one sequence to train on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor, device
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.data.chat import Messages, Prompt, TemplateOptions
from rlhf_ppo.data.detokenization import Before, TextPieces
from rlhf_ppo.data.tokenization import left_pad
from rlhf_ppo.generation.conversation import (
    Codec,
    Conversation,
    Conversations,
    ReadTurn,
    Reply,
    collect,
    reply_messages,
)
from rlhf_ppo.generation.environments.episodes import WrongAnswerError
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.runtime.command_line.user_code import FAILURES
from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.runtime.side_by_side import Call, Calls, CallTimeoutError

Respond = Callable[[Messages], Any]
"""``respond(messages)``, called after each turn of the policy with the whole conversation: the prompt's messages, then
assistant and replies by turns (a text prompt is one user message); returns a :data:`.conversation.Reply`, or what gives
one when awaited (``async def``). Calls for different conversations run at the same time, unless respond_concurrency is
1. What it returns after the last turn of all (max_turns, or a full context) is not used. One conversation is one list
that grows from call to call; it must not be changed. If ``respond`` has a method ``close_episodes()``, it is called
when a rollout is over, or has failed."""

GRACE_S = 0.1
"""Seconds to wait for more replies, before the conversations that have theirs are decoded: those of a function that
does not wait for anything then come together, and are decoded together."""
PATIENCE = 0.25
"""The same as a share of the time that the last turns took to decode."""


class RespondError(RunError):
    """A hook or environment failed, hung, or returned no reply; ``conversations`` is what was said until then."""

    def __init__(self, message: str, conversations: Sequence[Messages] = ()) -> None:
        super().__init__(message)
        self.conversations = conversations


class Opening(NamedTuple):
    """How a conversation begins."""

    prompt: Prompt
    ids: list[int]
    """The prompt's tokens."""
    template: TemplateOptions | None = None
    """What the chat template gets besides messages."""


class Partner(Protocol):
    """Who answers the policy in one conversation. Both methods are called in threads."""

    doing: str
    """The call that runs, or ran last, as messages name it."""

    def reset(self, row: dict[str, Any]) -> Prompt:
        """Begin with a data set's row; returns the prompt."""
        ...

    def step(self, messages: Messages) -> Any:
        """Answer the policy's turn with a :data:`.conversation.Reply`."""
        ...


class Hook:
    """``respond`` as a partner, which leaves the prompt to the data set."""

    doing = "respond"

    def __init__(self, respond: Respond) -> None:
        self._respond = respond

    def reset(self, row: dict[str, Any]) -> Prompt:
        """Return the row's own prompt."""
        return row["prompt"]

    def step(self, messages: Messages) -> Any:
        """Call ``respond``."""
        return self._respond(messages)


class Talk:
    """One conversation with its partner."""

    def __init__(self, number: int, partner: Partner, begin: Opening | dict[str, Any]) -> None:
        """Set who talks; ``number``: the rollout's row; ``begin``: how it begins, or the row that says it."""
        self.number, self.partner, self.begin = number, partner, begin
        self.conversation: Conversation | None = None
        self.turns = 0
        """Turns sampled so far."""

    @property
    def messages(self) -> Messages:
        """What was said so far."""
        return [] if self.conversation is None else self.conversation.messages


def sample_conversations(
    sample: Callable[[Tensor, Tensor, list[Before], list[Talk]], SampledResponses],
    talks: Sequence[Talk],
    params: SamplingParams,
    *,
    encode: Callable[[Talk, Prompt], Opening],
    calls: Calls,
    max_turns: int,
    room: int | None,
    tokenizer: PreTrainedTokenizerBase,
    device: device,
    read: ReadTurn | None = None,
) -> Conversations:
    """Sample turns of the policy, with the replies of its partners between them.

    Each turn continues from the very ids that were sampled before it; only the reply is encoded. While some
    conversations wait for replies, those that have theirs are decoded.

    Args:
        sample: samples one turn with ``params``: (ids [N, P] left-padded, mask [N, P], the same contexts [N] as what
            the turn's text lies behind, and whose turns these are [N]) -> responses.
        talks: [B] the conversations.
        params: what ends a turn.
        encode: encodes the prompt that a conversation was begun with.
        calls: calls the partners. One at a time: all replies are waited for, in order, before any turn is decoded.
        max_turns: maximum number of policy turns.
        room: maximum number of tokens before a turn; None: no limit. A reply that would exceed it is not added, and
            the conversation ends.
        tokenizer: the policy's.
        device: the model's.
        read: finds thinking and tool calls in a turn; None: a turn's text is its content.
    Raises:
        RespondError: a partner raised, timed out, or returned something else than it must, or what the chat template
            does not add to the end of a conversation; names the conversation.
    """
    codec = Codec(tokenizer, TextPieces(tokenizer), TextPieces(tokenizer, special=True), read)
    ready, asked, has_values, patience_s = list[Talk](), dict[Call, Talk](), False, GRACE_S
    for talk in talks:
        if isinstance(talk.begin, Opening):
            talk.conversation = Conversation(*talk.begin[:2], codec, params, talk.number, talk.begin.template)
            ready.append(talk)
        else:
            asked[calls.start(partial(talk.partner.reset, talk.begin))] = talk
    try:
        while ready or asked:
            if not ready:
                try:
                    ended = calls.ended(list(asked), math.inf if calls.at_once == 1 else patience_s)
                except CallTimeoutError as error:
                    raise _failure(
                        asked[error.call], talks, f"did not return within respond_timeout_s={calls.timeout_s}"
                    ) from None
                for call in ended:
                    talk = asked.pop(call)
                    answer = _answer(call, talk, talks)
                    if talk.conversation is None:
                        _begin(talk, answer, talks, encode, codec, params)
                        ready.append(talk)
                    elif talk.turns < max_turns and _continue(talk, answer, talks, room):
                        ready.append(talk)
                continue
            began = time.monotonic()
            ready.sort(key=lambda talk: talk.number)
            conversations = [talk.conversation for talk in ready if talk.conversation is not None]
            ids, mask = left_pad([one.context for one in conversations], device)
            sampled = sample(ids, mask, [one.before for one in conversations], ready)
            has_values = sampled.values is not None
            for row, (talk, conversation) in enumerate(zip(ready, conversations, strict=True)):
                conversation.add_turn(sampled, row, talk.turns)
                talk.turns += 1
                # After the last turn, too: an environment sees every action.
                asked[calls.start(partial(talk.partner.step, conversation.messages))] = talk
            ready = []
            patience_s = max(GRACE_S, PATIENCE * (time.monotonic() - began))
    finally:
        calls.abandon()
    return collect(
        [talk.conversation for talk in talks if talk.conversation is not None], params, has_values=has_values
    )


def _answer(call: Call, talk: Talk, talks: Sequence[Talk]) -> Any:
    """Return what a partner answered."""
    try:
        return call.future.result()
    except WrongAnswerError as error:
        raise _failure(talk, talks, str(error)) from None
    except FAILURES as error:
        hint = ""
        if isinstance(error, KeyError) and isinstance(talk.begin, dict) and talk.conversation is None:
            hint = f" (the row's columns are {sorted(talk.begin)})"
        raise _failure(talk, talks, f"raised {type(error).__name__}: {error}{hint}") from error


def _begin(
    talk: Talk,
    prompt: Prompt,
    talks: Sequence[Talk],
    encode: Callable[[Talk, Prompt], Opening],
    codec: Codec,
    params: SamplingParams,
) -> None:
    """Begin a conversation with the prompt that its partner chose."""
    try:
        opening = encode(talk, prompt)
        talk.conversation = Conversation(*opening[:2], codec, params, talk.number, opening.template)
    except ValueError as error:
        raise _failure(talk, talks, f"returned a prompt that cannot be used: {error}") from None


def _continue(talk: Talk, answer: Reply, talks: Sequence[Talk], room: int | None) -> bool:
    """Add a reply to the conversation; returns whether it goes on."""
    conversation = talk.conversation
    assert conversation is not None
    try:
        reply = reply_messages(answer)
    except ValueError as error:
        raise _failure(talk, talks, str(error)) from None
    if reply is None:
        return False
    try:
        ids = conversation.encode(reply)
    except ValueError as error:
        raise _failure(talk, talks, f"returned a reply that cannot be used: {error}") from None
    if room is not None and len(conversation.context) + len(ids) > room:
        conversation.context_full = True
        return False
    conversation.add_reply(reply, ids, talk.turns - 1)
    return True


def _failure(talk: Talk, talks: Sequence[Talk], what: str) -> RespondError:
    """Return the error of a partner, with all conversations."""
    begun = talk.conversation is not None
    about = (
        f"in conversation {talk.number}: {talk.messages!r:.500}"
        if begun
        else (f"for conversation {talk.number}, of the row {talk.begin!r:.500}")
    )
    return RespondError(f"{talk.partner.doing} {what}, {about}", [one.messages for one in talks])
