"""Another project's arguments: their types, defaults and choices, and values checked against them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlhf_ppo.config.migration_table import SOURCES

FIELDS_FILE = Path(__file__).parents[1] / "assets" / "migration-fields.json"
"""Types, defaults and choices of the real fields: TRL 1.12's made by `make trl-fields`, the others' by
`make migration-fields`."""

PAGES = {
    "trl": "docs/migrating-from-trl.md",
    "trl-0x": "docs/coming-from/trl-0x.md",
    "llama-factory": "docs/coming-from/llama-factory.md",
    "ms-swift": "docs/coming-from/ms-swift.md",
}
"""Project -> the page with its table."""

_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list[Any], "dict": dict, "null": None}


@cache
def classes_of(source: str) -> dict[str, dict[str, Any]]:
    """Return a project's classes: ``{class: {field: {"kinds": [...], "default": ..., "choices": [...]}}}``."""
    classes = json.loads(FIELDS_FILE.read_text(encoding="utf-8"))[source]
    return {name: fields for name, fields in classes.items() if name != "versions"}


@cache
def known_fields(source: str) -> dict[str, dict[str, Any]]:
    """Return a project's fields: its parser takes all classes as one list of arguments."""
    return {name: facts for fields in classes_of(source).values() for name, facts in fields.items()}


def with_defaults(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every argument of a project: the given value or the default."""
    return {name: facts["default"] for name, facts in known_fields(source).items()} | dict(given)


def check_values(source: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return values with their types, as the project reads them.

    Raises:
        ValueError: an unknown argument (with the closest known one), or a value of the wrong type.
    """
    return {name: _checked(source, name, value, where) for name, value in values.items()}


def read_flags(source: str, flags: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the values of flags: name without its dashes -> the words after it.

    Raises:
        ValueError: see :func:`check_values`; or several words for one value.
    """
    return dict(_flag(source, name.replace("-", "_"), list(words)) for name, words in flags.items())


def _flag(source: str, name: str, words: list[str]) -> tuple[str, Any]:
    known = known_fields(source)
    if name.startswith("no_") and name not in known and known.get(name[3:], {}).get("default") is True and not words:
        return name[3:], False
    if name in known and not words and "bool" in known[name]["kinds"]:
        return name, True
    listed = name in known and "list" in known[name]["kinds"] and len(words) > 1
    return name, _checked(source, name, words if listed or name not in known else one_word(name, words), "--")


def one_word(name: str, words: Sequence[str]) -> str:
    """Return a flag's one word.

    Raises:
        ValueError: none, or several.
    """
    if len(words) != 1:
        raise ValueError(f"--{name} takes one value, got {list(words)}")
    return words[0]


def _checked(source: str, name: Any, value: Any, where: str) -> Any:
    known = known_fields(source)
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; {PAGES[source]} lists the known ones"
        raise ValueError(f"{where}{name}: not an argument of {SOURCES[source]}'s PPO{hint}")
    kinds, choices = known[name]["kinds"], known[name].get("choices")
    if isinstance(value, str) and "list" in kinds and "str" not in kinds:
        value = [value]
    try:
        value = TypeAdapter(reduce(or_, (_TYPES[kind] for kind in kinds))).validate_python(value)
    except ValidationError:
        raise ValueError(f"{where}{name}: takes {' or '.join(kinds)}, got {value!r}") from None
    if choices and value is not None and value not in choices:
        raise ValueError(f"{where}{name}: {value!r} is none of {', '.join(map(str, choices))}")
    return value
