"""Template options: what a chat template gets besides messages, from the run's settings and each row's own columns."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ppo.data.chat import RENDERING, TemplateOptions, is_chat
from rlhf_ppo.data.rows import Rows

KWARGS, TOOLS = "chat_template_kwargs", "tools"
"""Columns of a row's own template variables, and of its own tools."""
Schema = Mapping[str, Any]
"""A tool as templates know it: ``{"type": "function", "function": {"name": ..., "parameters": ...}}``."""


@dataclass(frozen=True)
class TemplateDefaults:
    """What every chat of a run is rendered with, unless its row says otherwise."""

    kwargs: Mapping[str, Any] | None = None
    """``chat_template_kwargs``: variables of the template, such as enable_thinking."""
    tools: Sequence[Schema] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kwargs", template_kwargs(self.kwargs, KWARGS))

    def of_row(self, row: Mapping[str, Any], where: str) -> TemplateOptions:
        """Return what a row's chat is rendered with: its own variables over the run's, its own tools for the run's.

        Raises:
            ValueError: a column of the wrong kind; names ``where``.
        """
        kwargs = {**(self.kwargs or {}), **template_kwargs(row.get(KWARGS), f"{where}: {KWARGS}")}
        own = tool_schemas(row.get(TOOLS), self.tools, f"{where}: {TOOLS}")
        tools = list(self.tools) if own is None else own
        return {**kwargs, TOOLS: tools} if tools else kwargs

    def of_columns(self, columns: Mapping[str, Sequence[Any]], count: int) -> list[TemplateOptions]:
        """Return what each of ``count`` rows is rendered with."""
        own = {name: columns[name] for name in (KWARGS, TOOLS) if name in columns}
        return [self.of_row({name: own[name][i] for name in own}, f"prompt {i}") for i in range(count)]


def template_of_rows(rows: Rows, defaults: TemplateDefaults) -> list[TemplateOptions]:
    """Return what each row's chat is rendered with.

    Raises:
        ValueError: a column of the wrong kind; names the row.
    """
    columns = {name: rows[name] for name in (KWARGS, TOOLS) if name in rows.column_names}
    own = [{name: columns[name][i] for name in columns} for i in range(len(rows))]
    return [defaults.of_row(row, where) for row, where in zip(own, rows.names, strict=True)]


def template_kwargs(value: Any, what: str) -> dict[str, Any]:
    """Return variables of a template, given as a mapping, its JSON text or None; in a row None means "not given".

    Raises:
        ValueError: neither, or a name that rendering sets itself; begins with ``what``.
    """
    given = _read_json(value)
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(f'{what} must be a mapping such as {{"enable_thinking": false}}, got {value!r:.80}')
    for name in given:
        if name in RENDERING:
            other = "set tools" if name == TOOLS else "leave it out"
            raise ValueError(f"{what} has {name!r}, which rendering sets, not you: {other}")
    return {name: part for name, part in given.items() if part is not None}


def tool_schemas(value: Any, known: Sequence[Schema], what: str) -> list[dict[str, Any]] | None:
    """Return a row's tools, given as JSON schemas, names of the run's tools, JSON text of either, or None.

    Raises:
        ValueError: neither, or a name that the run does not have; begins with ``what``.
    """
    given = _read_json(value)
    if given is None or given == "":
        return None
    names = {tool_name(schema): dict(schema) for schema in known}
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{what} must be a list of JSON schemas, or of names of the run's tools, got {value!r:.80}")
    schemas: list[dict[str, Any]] = []
    for tool in given:
        if isinstance(tool, str):
            if tool not in names:
                has = f"it has {', '.join(names)}" if names else "it has none"
                raise ValueError(f"{what} names {tool!r}, which is no tool of the run: {has}")
            schemas.append(names[tool])
        elif isinstance(tool, Mapping) and tool_name(tool):
            schemas.append(_without_none(tool))
        else:
            raise ValueError(f"{what} has {tool!r:.80}, which is no JSON schema of a function with a name")
    return schemas


def tool_name(schema: Schema) -> str:
    """Return the name in a tool's schema, or ""."""
    function = schema.get("function", schema)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def require_read(tokenizer: PreTrainedTokenizerBase, prompt: Any, options: TemplateOptions, what: str) -> None:
    """Raise a ValueError that begins with ``what`` if the chat template reads one of these variables nowhere."""
    template = tokenizer.chat_template
    if not is_chat(prompt) or not isinstance(template, str):
        return
    read = set(re.findall(r"\w+", template))
    for name in options:
        if name not in read and name != TOOLS:
            close = difflib.get_close_matches(name, read, n=1)
            meant = f"did you mean {close[0]!r}?" if close else "leave it out, or take another template"
            raise ValueError(f"{what}: the chat template reads no variable {name!r}: {meant}")


def _read_json(value: Any) -> Any:
    """Parse JSON text, in which data sets often hold what differs from row to row; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _without_none(value: Any) -> Any:
    """Drop the missing keys that Arrow fills with None where rows differ."""
    if isinstance(value, Mapping):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, (list, tuple)) else value
