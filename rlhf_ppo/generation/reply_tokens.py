"""Reply tokens: encode an environment's reply so that it continues the very ids that were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ppo.data.chat import MALFORMED, Message, Messages, TemplateOptions, render_chat, render_prompt
from rlhf_ppo.data.tokenization import encode_after, encode_bare

_PLACEHOLDER = "(turn)x"
"""Stands for the policy's turn in the template: what it said is there as it was sampled."""
_THINKING = ("reasoning_content", "reasoning", "thinking")
"""Fields of messages that hold thinking."""


def chat_reply_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    turn: Message,
    reply: Messages,
    stop: int | None,
    where: str = "the conversation",
    template: TemplateOptions | None = None,
) -> list[int]:
    """Return the token ids to append after the policy's turn, so that it can answer ``reply``.

    They are what the chat template puts after a turn: its end, the messages of the reply, and the opening of the next
    turn. Only the prompt stands before the turn there: what was said between them is there as it was.

    Args:
        tokenizer: the policy's, with a chat template.
        prompt: the messages that the conversation began with.
        turn: the policy's last message; read only by templates that want to see the calls that a tool answers.
        reply: the messages to add.
        stop: the stop token that the policy's turn ended with, or None. Where the template would put it, it is there.
        where: what to call the conversation in messages.
        template: what the template gets besides messages.
    Raises:
        ValueError: the template fails, or renders the prompt differently once it continues; names ``where``.
    """
    try:
        rest = _after_the_turn(tokenizer, prompt, reply, where, template)
    except ValueError:
        # Some templates refuse a tool's message that follows no call.
        called = _with_stand_ins(turn)
        if not called.get("tool_calls") or all(message["role"] != "tool" for message in reply):
            raise
        return encode_bare(tokenizer, _after_calls(tokenizer, [*prompt, called], reply, stop, where, template))
    ids = encode_after(tokenizer, "x", rest)
    if ids is None:
        ids = encode_bare(tokenizer, rest)
    # Some templates put a space before the end of a turn.
    if stop in ids and not str(tokenizer.decode(ids[: ids.index(stop)])).strip():
        return ids[ids.index(stop) + 1 :]
    return ids


def _after_the_turn(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    reply: Messages,
    where: str,
    template: TemplateOptions | None,
) -> str:
    """Return what is rendered after a placeholder for the turn."""
    # Templates drop earlier thinking; that in the prompt is there as it was.
    told = [_without_thinking(message) for message in prompt]
    before = render_chat(tokenizer, told, where, template)
    answered = [*told, {"role": "assistant", "content": _PLACEHOLDER}, *reply]
    after = render_prompt(tokenizer, answered, where, template)
    if not after.startswith(before) or after.count(_PLACEHOLDER) != 1:
        raise ValueError(
            f"{where}: the chat template does not render a conversation by adding to its end, so a further turn would "
            "change what came before it: use a template that keeps earlier messages as they were, or write prompts as "
            "text "
            f"(before the turn: {before[-80:]!r}; with an answer: {after[-160:]!r})"
        )
    return after[after.index(_PLACEHOLDER) + len(_PLACEHOLDER) :]


def _after_calls(
    tokenizer: PreTrainedTokenizerBase,
    called: Sequence[Message],
    reply: Messages,
    stop: int | None,
    where: str,
    template: TemplateOptions | None,
) -> str:
    """Return what is rendered after a turn that ends in tool calls, which the template must see."""
    before = render_chat(tokenizer, called, where, template)
    after = render_prompt(tokenizer, [*called, *reply], where, template)
    if not after.startswith(before):
        raise ValueError(
            f"{where}: the chat template renders a message with tool calls differently once a tool has answered: use "
            f"another template (before: {before[-80:]!r}; with an answer: {after[-160:]!r})"
        )
    end = str(tokenizer.decode([] if stop is None else [stop]))
    _, found, space = before.rpartition(end) if end else ("", "", "")
    return (space if found and not space.strip() else "") + after[len(before) :]


def _with_stand_ins(turn: Message) -> Message:
    """Return the turn with a call in place of each that cannot be read, because it is answered like the others."""
    function = {"name": "malformed", "arguments": {}}
    stand_ins = [{"id": call["id"], "type": "function", "function": function} for call in turn.get(MALFORMED) or ()]
    calls = sorted([*(turn.get("tool_calls") or ()), *stand_ins], key=lambda call: str(call.get("id")))
    return {**turn, "tool_calls": calls} if stand_ins else turn


def _without_thinking(message: Message) -> dict[str, Any]:
    kept = {name: value for name, value in message.items() if name not in _THINKING}
    if message["role"] == "assistant" and isinstance(message.get("content"), str):
        kept["content"] = message["content"].rpartition("</think>")[2]
    return kept
