"""Tool parsers: find thinking and tool calls in the text of a turn, in the formats that models are trained to write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Call:
    """One call of a turn."""

    text: str
    """As the policy wrote it."""
    name: str = ""
    arguments: Any = None
    """A mapping."""
    error: str = ""
    """What is wrong with it; empty: it names a function and arguments."""


@dataclass(frozen=True)
class Turn:
    """What a turn says."""

    content: str
    """The text without thinking and without calls; malformed ones stay in it."""
    thinking: str = ""
    calls: tuple[Call, ...] = ()


class MalformedCallError(ValueError):
    """A tool call that cannot be read."""


def parse_turn(text: str, parser: str, *, thinks: bool) -> Turn:
    """Read a turn.

    Args:
        text: what the policy wrote, special tokens included, without its stop token.
        parser: a name in :data:`PARSERS`.
        thinks: the prompt has opened the thinking already.
    """
    thinking, closed, rest = text.partition("</think>")
    if not closed and not thinks and "<think>" not in text:
        thinking, rest = "", text
    elif not closed and "<think>" in text:
        before, _, thinking = text.partition("<think>")
        rest = before
    elif closed:
        thinking = thinking.rpartition("<think>")[2]
    calls: list[Call] = []
    kept, end = "", 0
    for start, stop, piece in PARSERS[parser].find(rest):
        calls.append(read_call(piece, PARSERS[parser].read))
        kept += rest[end : stop if calls[-1].error else start]
        end = stop
    content = kept + rest[end:]
    changed = bool(thinking or calls or closed)
    return Turn(content.strip() if changed else content, thinking.strip("\n"), tuple(calls))


def read_call(text: str, read: Callable[[str], tuple[str, Any]]) -> Call:
    """Read one call; whatever is wrong with it is its ``error``."""
    try:
        name, arguments = read(text)
        _require_whole_characters([name, arguments])
    except (ValueError, RecursionError) as error:  # json: deeper than Python's stack
        return Call(text, error=str(error) or type(error).__name__)
    return Call(text, name, arguments)


def _require_whole_characters(call: Any) -> None:
    """Refuse a call with half a character, such as JSON's "\\ud800": neither tokenizers nor files take it."""
    try:
        json.dumps(call, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise MalformedCallError("it has half a character (a lone surrogate, \\ud800 to \\udfff)") from None


def named_call(value: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and arguments of a call that was written as JSON.

    Raises:
        MalformedCallError: no name, or arguments that are no mapping.
    """
    if not isinstance(value, dict):
        raise MalformedCallError(f"a call is a JSON object with name and arguments, got {value!r:.80}")
    value = value.get("function", value) if isinstance(value.get("function"), dict) else value
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(name, str) or not name:
        raise MalformedCallError('a call needs a "name"')
    if not isinstance(arguments, dict):
        raise MalformedCallError('a call needs "arguments", a JSON object')
    return name, arguments


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise MalformedCallError(f"not valid JSON: {error.msg} at character {error.pos}") from None


# Formats: where calls are in a text, as (start, end, text of the call), and how one is read.

Place = tuple[int, int, str]


@dataclass(frozen=True)
class Format:
    """How one family of models writes calls."""

    find: Callable[[str], Iterator[Place]]
    read: Callable[[str], tuple[str, Any]]
    example: str
    typed: bool = True
    """False: all arguments are read as text."""


def _tagged(text: str) -> Iterator[Place]:
    """<tool_call>...</tool_call>; one that is not closed reaches to the next, or to the end."""
    for found in re.finditer(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", text, re.DOTALL):
        yield found.start(), found.end(), found[1] if found[2] else found[0]


def _read_tagged_json(text: str) -> tuple[str, Any]:
    if text.startswith("<tool_call>"):
        raise MalformedCallError("</tool_call> is missing")
    return named_call(_json(text.strip()))


def _read_xml(text: str) -> tuple[str, Any]:
    """<function=NAME><parameter=KEY>VALUE</parameter></function>; values are text."""
    if text.startswith("<tool_call>"):
        raise MalformedCallError("</tool_call> is missing")
    found = re.fullmatch(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", text, re.DOTALL)
    if found is None:
        raise MalformedCallError("a call is <function=NAME>...</function> inside <tool_call>")
    pairs = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", found[2], re.DOTALL)
    return found[1].strip(), {key.strip(): value for key, value in pairs}


def _objects(text: str) -> Iterator[Place]:
    """A text that is JSON objects from its beginning, after <|python_tag|> or not, with ; between them."""
    tag = "<|python_tag|>"
    start = text.find(tag)
    at = start + len(tag) if start >= 0 else len(text) - len(text.lstrip())
    if start < 0 and not text[at:].startswith("{"):
        return
    decoder = json.JSONDecoder()
    first = start if start >= 0 else at
    while at < len(text):
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = len(text)
        yield first, end, text[at:end]
        first, at = end, re.compile(r"[\s;]*").match(text, end).end()  # type: ignore[union-attr]


def _mistral(text: str) -> Iterator[Place]:
    """[TOOL_CALLS] [{...}, {...}], or [TOOL_CALLS]name[ARGS]{...} once for each call."""
    for found in re.finditer(r"\[TOOL_CALLS\](.*?)(?=\[TOOL_CALLS\]|\Z)", text, re.DOTALL):
        body = found[1].strip()
        try:
            listed = json.loads(body)
        except (ValueError, RecursionError):
            listed = None
        if not isinstance(listed, list) or not listed:
            yield found.start(), found.end(), body
            continue
        for i, item in enumerate(listed):
            yield (found.start() if i == 0 else found.end()), found.end(), json.dumps(item)


def _read_mistral(text: str) -> tuple[str, Any]:
    found = re.fullmatch(r"([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*\})", text, re.DOTALL)
    return named_call({"name": found[1], "arguments": found[2]} if found else _json(text))


PARSERS: dict[str, Format] = {
    "hermes": Format(_tagged, _read_tagged_json, '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'),
    "qwen3_xml": Format(
        _tagged,
        _read_xml,
        "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
        typed=False,
    ),
    "llama3_json": Format(_objects, lambda text: named_call(_json(text)), '{"name": "f", "parameters": {"x": 1}}'),
    "mistral": Format(_mistral, _read_mistral, '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]'),
}
"""Name -> how models of that family write calls."""

TEMPLATE = "template"
"""The name of the parser that the tokenizer brings: its response template."""


def choose_parser(tokenizer: PreTrainedTokenizerBase, setting: str) -> str:
    """Return the parser's name: the setting's, or for "auto" the one that fits the tokenizer and its chat template.

    Raises:
        ValueError: there is none, or "template" where the tokenizer has no response template.
    """
    own = getattr(tokenizer, "response_template", None) is not None
    if setting == TEMPLATE and not own:
        raise ValueError(
            f"tool_parser='template', but the tokenizer has no response template: name one of {', '.join(PARSERS)}"
        )
    if setting != "auto":
        return setting
    if own:
        return TEMPLATE
    text = str(tokenizer.chat_template or "")
    signs = {
        "mistral": "[TOOL_CALLS]" in text,
        "qwen3_xml": "<function=" in text,
        "hermes": "<tool_call>" in text,
        "llama3_json": "<|python_tag|>" in text or ("ipython" in text and '"parameters"' in text),
    }
    found = [name for name, there in signs.items() if there]
    if not found:
        raise ValueError(
            "tool_parser='auto' finds no known format of tool calls in the chat template: name one of "
            f"{', '.join(PARSERS)}, or take a chat template that shows tool calls"
        )
    return found[0]
