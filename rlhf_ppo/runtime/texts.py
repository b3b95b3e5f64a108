"""Texts as people read them: chats as lines, differences of two texts, and how varied the words of some are."""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Said = Any
"""Text, or a list of chat messages."""


def display_text(said: Said) -> str:
    """Format a prompt or completion to be read: text as it is, a chat with a "role: content" line per message."""
    if isinstance(said, str):
        return said
    return "\n".join(f"{message['role']}: {_display_content(message)}" for message in said)


def _display_content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        return json.dumps(message.get("tool_calls"), ensure_ascii=False, default=str)
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", f"[{part.get('type')}]")) for part in content)


def printable(text: str) -> str:
    """Replace control characters but newline and tab: a model may write those that command a terminal."""
    return "".join(
        "\ufffd" if x not in "\n\t" and unicodedata.category(x) == "Cc" else x for x in text.replace("\r\n", "\n")
    )


class Piece(NamedTuple):
    """A piece of a text."""

    text: str
    marked: bool
    """It is not in the other text."""


def mark_differences(one: str, other: str) -> tuple[list[Piece], list[Piece]]:
    """Split two texts into what they share, in order, and what is in one of them alone; by words."""
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (one, other))
    left: list[Piece] = []
    right: list[Piece] = []
    # Words alone are compared, so that a common space is no common text.
    for tag, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        same = tag == "equal" and any(not word.isspace() for word in a[a0:a1])
        if a1 > a0:
            left.append(Piece("".join(a[a0:a1]), not same))
        if b1 > b0:
            right.append(Piece("".join(b[b0:b1]), not same))
    return left, right


def distinct(texts: Sequence[str], n: int) -> float:
    """Compute the share of distinct ones among all word n-grams of the texts together; 0 without any.

    It falls as more text is counted, so compare only equal numbers of texts of similar length.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models" (2016).
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
