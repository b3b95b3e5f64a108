"""Chats: which messages can be read, and what a chat template makes of them; every call of a template is here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Messages = list[dict[str, Any]]
"""``[{"role": "user", "content": "..."}]``; other fields, such as ``tool_calls``, reach the template as they are."""


def is_chat(value: Any) -> bool:
    """Whether this is a list of messages: mappings with a role, and content or tool calls."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(m, Mapping) and "role" in m and ("content" in m or "tool_calls" in m) for m in value)
    )


def message_text(message: Message, where: str) -> str:
    """The content of one message as text: parts of type "text" are joined, tool calls without content are "".

    Raises:
        ValueError: content that is no text, such as an image, or none at all; names ``where`` and the role.
    """
    content = message.get("content")
    said = f"{where}: the content of the {message['role']} message"
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        for part in content:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, Mapping) else part
                raise ValueError(f"{said} has a part {kind!r:.80}, but only text is read: remove the part or the row")
        return "".join(part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        return ""
    raise ValueError(f"{said} must be text, got {content!r:.80}: give it text, or remove the row")


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> str:
    """The chat through the template, ready for a reply; an assistant's message at its end is left open and goes on.

    Raises:
        ValueError: no template, one that fails on this chat, content that is no text, or an empty assistant message at
            the end; names ``where``.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: the prompt is a chat, but the tokenizer has no chat template; "
            "give it one (chat_template), take a model whose tokenizer has one, or write prompts as text"
        )
    if not begins_answer(messages):
        return _render(tokenizer, messages, where, add_generation_prompt=True)
    if not message_text(messages[-1], where).strip():
        raise ValueError(
            f"{where}: the chat ends with an empty assistant message: remove it, or begin the answer in it"
        )
    return _render(tokenizer, messages, where, continue_final_message=True)


def whole_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> str:
    """The whole chat through the template, or written out as "role: content" where the tokenizer has none.

    Raises:
        ValueError: the template fails on this chat, or content that is no text; names ``where``.
    """
    if tokenizer.chat_template:
        return _render(tokenizer, messages, where)
    return "\n\n".join(
        f"{message['role']}: {message_text(message, where)}"
        + (json.dumps(message["tool_calls"]) if message.get("tool_calls") else "")
        for message in messages
    )


def answered(prompt: Sequence[Message], answer: str, where: str) -> Messages:
    """The chat with an answer as the assistant's message, or at the end of the one that the prompt begins."""
    if begins_answer(prompt):
        begun = {**prompt[-1], "content": message_text(prompt[-1], where) + answer}
        return [*map(dict, prompt[:-1]), begun]
    return [*map(dict, prompt), {"role": "assistant", "content": answer}]


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answer: str, where: str) -> str:
    """The answer as it follows :func:`prompt_text`: behind the white space that the template puts before it.

    Raises:
        ValueError: the template fails on the chat with its answer; names ``where``.
    """
    before, whole = prompt_text(tokenizer, prompt, where), whole_text(tokenizer, answered(prompt, answer, where), where)
    rest = whole[len(before) :].lstrip()
    if not whole.startswith(before) or not rest.startswith(answer.strip()):
        return answer
    return whole[len(before) : len(whole) - len(rest)] + answer.lstrip()


def begins_answer(messages: Sequence[Message]) -> bool:
    """Whether the chat ends within the assistant's message; tool calls end it."""
    return bool(messages) and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")


def require_next_speaker(messages: Sequence[Message], where: str) -> None:
    """Raise a ValueError if the chat ends within the assistant's message, which a conversation of turns cannot do."""
    if begins_answer(messages):
        raise ValueError(
            f"{where}: the prompt ends with an assistant message, but with several turns (max_turns) each turn is a "
            "message of its own: end the prompt with the user's, or remove the row"
        )


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, **options: Any) -> str:
    readable = [_with_text(message, where) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(readable, tokenize=False, **options))
    except Exception as error:  # a template raises what it likes: its own refusal, an undefined name, a TypeError
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{where}: the chat template fails on this chat ({type(error).__name__}: {reason}); change or remove the "
            "row, or give the tokenizer another chat template"
        ) from error


def _with_text(message: Message, where: str) -> dict[str, Any]:
    text = message_text(message, where)
    return dict(message) if message.get("content") is None else {**message, "content": text}
