"""Tool schemas: functions as chat templates show them to the policy, and arguments checked against them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

Tool = Callable[..., Any]
Functions = Mapping[str, tuple[Tool, dict[str, Any]]]
"""Name -> (function, JSON schema)."""


def tool_functions(tools: Any) -> dict[str, tuple[Tool, dict[str, Any]]]:
    """Return name -> (function, JSON schema) of functions that the policy may call.

    The schema is made of the docstring and the type hints.

    Raises:
        ValueError: no list of functions, two of one name, an asynchronous one, or one without a docstring or a type
            hint; names it.
    """
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise ValueError(f"tools must be a list of functions, got {tools!r:.80}")
    found: dict[str, tuple[Tool, dict[str, Any]]] = {}
    for tool in tools:
        name = getattr(tool, "__name__", None)
        if not callable(tool) or isinstance(tool, type) or name is None:
            raise ValueError(f"tools must be functions, got {tool!r:.80}: wrap it in one, with a docstring")
        if name in found:
            raise ValueError(f"tools has two functions named {name!r}: rename one")
        if inspect.iscoroutinefunction(tool):
            raise ValueError(f"tool {name!r} is asynchronous: wrap it in a function that waits for it (asyncio.run)")
        try:
            found[name] = tool, get_json_schema(tool)
        except Exception as error:  # parsing of docstrings and hints may raise anything
            reason = " ".join(str(error).split())
            raise ValueError(
                f"tool {name!r} cannot be described to the policy ({reason}): give it a docstring that says what it "
                'does and, under "Args:", what each parameter is, and a type hint for each parameter'
            ) from None
    return found


def argument_error(tool: Tool, schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """Return what is wrong with a call's arguments, for the policy to read; "" if nothing."""
    try:
        inspect.signature(tool).bind(**arguments)
    except TypeError as error:
        return str(error)
    properties = schema["function"]["parameters"].get("properties", {})
    for name, value in arguments.items():
        if name in properties and not _fits(value, properties[name]):
            kind = properties[name].get("type", "another value")
            choices = properties[name].get("enum")
            wanted = f"one of {choices}" if choices else str(kind)
            return f"argument {name!r} must be {wanted}, got {value!r:.80}"
    return ""


def typed_arguments(schema: Mapping[str, Any], arguments: Mapping[str, str]) -> dict[str, Any]:
    """Read arguments that were written as text: as JSON, unless the schema says text or they are none."""
    properties = schema["function"]["parameters"].get("properties", {})

    def read(name: str, value: str) -> Any:
        if _fits(value, properties.get(name, {})):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value

    return {name: read(name, value) for name, value in arguments.items()}


_KINDS: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value that was read from JSON has one of the schema's types; unknown types fit."""
    if value is None and schema.get("nullable"):
        return True
    if "anyOf" in schema:
        return any(_fits(value, part) for part in schema["anyOf"])
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    known = [_KINDS[kind] for kind in kinds if kind in _KINDS]
    if known and not any(fits(value) for fits in known):
        return False
    return not isinstance(value, list) or all(_fits(item, schema.get("items", {})) for item in value)
