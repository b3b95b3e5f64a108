"""Reply tokens: encode an environment's reply so that it continues the very ids that were sampled."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlhf_ppo.data.chat import Messages, render_prompt
from rlhf_ppo.data.tokenization import encode_after, encode_bare

_PLACEHOLDER = "x"
"""Stands for the policy's turn in the template: what it said is there as it was sampled."""


def chat_reply_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    reply: str,
    stop: int | None,
    where: str = "the conversation",
) -> list[int]:
    """Return the token ids to append after the policy's turn, ``messages[-1]``, so that it can answer ``reply``.

    They are what the chat template puts after the turn: its end, the reply as a user message, and the opening of the
    next turn.

    Args:
        tokenizer: the policy's, with a chat template.
        messages: the conversation; the last message is the policy's.
        reply: text of the user message to add.
        stop: the stop token that the policy's turn ended with, or None. Where the template would put it, it is there.
        where: what to call the conversation in messages.
    Raises:
        ValueError: the template fails, or renders the conversation differently once it continues; names ``where``.
    """
    before = render_prompt(tokenizer, messages[:-1], where)
    answered = [*messages[:-1], {"role": "assistant", "content": _PLACEHOLDER}, {"role": "user", "content": reply}]
    after = render_prompt(tokenizer, answered, where)
    # Some templates put a space before the turn; the policy has written its own.
    turn = after[len(before) :].lstrip()
    if not after.startswith(before) or not turn.startswith(_PLACEHOLDER):
        raise ValueError(
            f"{where}: the chat template does not render a conversation by adding to its end, so a further turn would "
            "change what came before it: use a template that keeps earlier messages as they were, or write prompts as "
            "text "
            f"(before the turn: {before[-80:]!r}; with an answer: {after[-160:]!r})"
        )
    rest = turn[len(_PLACEHOLDER) :]
    ids = encode_after(tokenizer, _PLACEHOLDER, rest)
    if ids is None:
        ids = encode_bare(tokenizer, rest)
    # Some templates put a space before the end of a turn.
    if stop in ids and not str(tokenizer.decode(ids[: ids.index(stop)])).strip():
        return ids[ids.index(stop) + 1 :]
    return ids
