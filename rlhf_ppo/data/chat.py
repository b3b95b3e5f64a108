"""Chat templates: which messages are valid, and every call of a chat template.

A *prefill* is an assistant message at the end of a prompt, which the response continues.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Messages = list[dict[str, Any]]
"""``[{"role": "user", "content": "..."}]``; other fields, such as ``tool_calls``, reach the template unchanged."""
Prompt = str | Messages
"""Text or chat messages."""
Completion = str | Messages
"""What follows a prompt: text, or after several turns the messages that follow a chat prompt."""
TemplateOptions = Mapping[str, Any]
"""What a chat template gets besides messages: ``chat_template_kwargs``, and ``tools`` (JSON schemas)."""
RENDERING = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"} - {"documents"}
"""Names that rendering sets, which are no template's variables."""
SAMPLED_TEXT = "sampled_text"
"""Field of the policy's messages: the turn's whole text, where thinking or tool calls were taken out of ``content``."""
MALFORMED = "malformed_tool_calls"
"""Field of the policy's messages: calls that cannot be read, {id, text, error} each."""


def with_chat_template(tokenizer: PreTrainedTokenizerBase, source: str | None) -> PreTrainedTokenizerBase:
    """Copy the tokenizer with the template that ``source`` gives; the tokenizer itself for None."""
    if source is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = read_chat_template(source)
    return tokenizer


def read_chat_template(source: str) -> str:
    """Read a Jinja template, given as text or as the name of its file.

    Raises:
        ValueError: no such file.
    """
    if "{" in source:
        return source
    if not Path(source).is_file():
        raise ValueError(
            f"chat template file {source} does not exist: name a file with a Jinja template, or write the template"
        )
    return Path(source).read_text(encoding="utf-8")


# Messages


def is_chat(value: Any) -> bool:
    """Return whether this is a list of messages: mappings with a role, and content or tool calls."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(m, Mapping) and "role" in m and ("content" in m or "tool_calls" in m) for m in value)
    )


def message_text(message: Message, where: str) -> str:
    """Return a message's content as text: parts of type "text" joined; "" for tool calls without content.

    Raises:
        ValueError: no content, or content that is not text, such as an image; names ``where`` and the role.
    """
    content = message.get("content")
    what = f"{where}: the content of the {message['role']} message"
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        for part in content:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, Mapping) else part
                raise ValueError(
                    f"{what} has a part {kind!r:.80}, but only text is supported: remove the part or the row"
                )
        return "".join(part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        return ""
    raise ValueError(f"{what} must be text, got {content!r:.80}: give it text, or remove the row")


def ends_in_prefill(messages: Sequence[Message]) -> bool:
    """Return whether the chat ends with an assistant message to continue; one with tool calls is complete."""
    return bool(messages) and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")


def refuse_prefill(messages: Sequence[Message], where: str) -> None:
    """Raise a ValueError if the chat ends with an assistant message, which several turns cannot continue."""
    if ends_in_prefill(messages):
        raise ValueError(
            f"{where}: the prompt ends with an assistant message, but with several turns (max_turns) each turn is a "
            "message of its own: end the prompt with the user's, or remove the row"
        )


def with_answer(prompt: Sequence[Message], answer: str, where: str) -> Messages:
    """Append an answer to the chat as the assistant's message, or to its prefill."""
    if ends_in_prefill(prompt):
        continued = {**prompt[-1], "content": message_text(prompt[-1], where) + answer}
        return [*map(dict, prompt[:-1]), continued]
    return [*map(dict, prompt), {"role": "assistant", "content": answer}]


# Rendering


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, template: TemplateOptions | None = None
) -> str:
    """Render a chat that the policy answers: with a generation prompt, or with its prefill left open.

    Raises:
        ValueError: no template, one that fails on this chat, content that is not text, or an empty prefill; names
            ``where``.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: the prompt is a chat, but the tokenizer has no chat template; "
            "give it one (chat_template), take a model whose tokenizer has one, or write prompts as text"
        )
    if not ends_in_prefill(messages):
        return _render(tokenizer, messages, where, template, add_generation_prompt=True)
    if not message_text(messages[-1], where).strip():
        raise ValueError(
            f"{where}: the chat ends with an empty assistant message: remove it, or begin the answer in it"
        )
    return _render(tokenizer, messages, where, template, continue_final_message=True)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, template: TemplateOptions | None = None
) -> str:
    """Render a finished chat; without a template each message is written as "role: content".

    Raises:
        ValueError: the template fails on this chat, or content is not text; names ``where``.
    """
    if tokenizer.chat_template:
        return _render(tokenizer, messages, where, template)
    return "\n\n".join(
        f"{message['role']}: {message_text(message, where)}"
        + (json.dumps(message["tool_calls"]) if message.get("tool_calls") else "")
        for message in messages
    )


def render_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    answer: str,
    where: str,
    template: TemplateOptions | None = None,
) -> str:
    """Return the answer as it follows :func:`render_prompt`, with the white space that the template puts before it.

    Raises:
        ValueError: the template fails on the chat with its answer; names ``where``.
    """
    before = render_prompt(tokenizer, prompt, where, template)
    whole = render_chat(tokenizer, with_answer(prompt, answer, where), where, template)
    rest = whole[len(before) :].lstrip()
    if not whole.startswith(before) or not rest.startswith(answer.strip()):
        return answer
    return whole[len(before) : len(whole) - len(rest)] + answer.lstrip()


def render_completed(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completion: Completion,
    where: str,
    template: TemplateOptions | None = None,
) -> str:
    """Render a prompt with its completion, as a reward model reads them: joined text, or the finished chat.

    Raises:
        ValueError: the chat cannot be rendered (see :func:`render_chat`); names ``where``.
    """
    if isinstance(prompt, str):
        return f"{prompt}{completion}"
    messages = with_answer(prompt, completion, where) if isinstance(completion, str) else [*prompt, *completion]
    return render_chat(tokenizer, messages, where, template)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    template: TemplateOptions | None,
    **options: Any,
) -> str:
    readable = [_with_text(message, where) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(readable, tokenize=False, **(template or {}), **options))
    except Exception as error:  # a template may raise anything: its own refusal, an undefined name, a TypeError
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{where}: the chat template fails on this chat ({type(error).__name__}: {reason}); change or remove the "
            "row, or give the tokenizer another chat template"
        ) from error


def _with_text(message: Message, where: str) -> dict[str, Any]:
    text = message_text(message, where)
    return dict(message) if message.get("content") is None else {**message, "content": text}
