"""Settings: check each value against its field's annotation, and a number against its range, when they are made."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_real(value: Any) -> bool:
    if _is_bool(value) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


# A bool is no number; a path is text.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    float: ("a number", _is_real),
    int: ("a whole number", lambda value: isinstance(value, numbers.Integral) and not _is_bool(value)),
    bool: ("True or False", _is_bool),
    str: ("text", lambda value: isinstance(value, (str, os.PathLike))),
    NoneType: ("None", lambda value: value is None),
    Any: ("anything", lambda value: True),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of dataclasses that users fill in: values are checked when an instance is made.

    A subclass calls ``super().__post_init__()``, then checks ranges and contradictions of its own.
    """

    def __post_init__(self) -> None:
        require_types(self)

    def _require(self, what: str, holds: Callable[[Any], bool], *names: str) -> None:
        """Raise a ValueError for the first of these settings whose value breaks the rule; None always passes."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                if _fits(None, _hints(type(self))[name]):
                    what += ", or None" if " " in what else " or None"
                raise ValueError(f"{name} must be {what}, got {value}")

    def _require_positive(self, *names: str) -> None:
        self._require("positive", lambda value: value > 0, *names)

    def _require_at_least(self, low: int, *names: str) -> None:
        self._require(f"{low} or more", lambda value: value >= low, *names)

    def _require_between(self, low: int, high: int, *names: str) -> None:
        self._require(f"between {low} and {high}", lambda value: low <= value <= high, *names)


def is_changed(settings: Any, name: str) -> bool:
    """Return whether a field of a dataclass instance differs from its default."""
    return any(getattr(settings, name) != field.default for field in dataclasses.fields(settings) if field.name == name)


def refuse_unread(settings: Settings, why: str, *names: str) -> None:
    """Raise a ValueError for the first of these settings that was changed although the others leave it without effect.

    Args:
        settings: the instance.
        why: which other setting leaves them without effect.
        names: the settings.
    """
    for name in names:
        if is_changed(settings, name):
            value = getattr(settings, name)
            raise ValueError(f"{name}={value!r} has no effect: {why}. Leave it out, or change the other")


def require_types(settings: Any) -> None:
    """Check every field of a dataclass instance against its annotation: a number, text, a tuple of these, or None.

    Numbers must be finite, and whole where the annotation is int: 1e6 is, and becomes 1000000 in the field. Lists do
    for tuples.

    Raises:
        ValueError: names the field, what it takes, and what came; for a Literal the known values and the closest one.
    """
    hints = _hints(cast("type[Any]", type(settings)))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if _fits(value, hint):
            continue
        if _fits(whole := _as_whole(value), hint):
            object.__setattr__(settings, field.name, whole)
        elif known := _choices(hint):
            close = difflib.get_close_matches(str(value), known, n=1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown {field.name} {value!r:.80}{meant}; known: {', '.join(known)}")
        else:
            came = f"the text {value!r:.80}" if isinstance(value, str) else f"{value!r:.80}"
            raise ValueError(f"{field.name} must be {_words(hint)}, got {came}")


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in inner)
    if origin is tuple:
        items: list[Any] = list(value) if isinstance(value, (tuple, list)) else [object()]  # pyright: ignore[reportUnknownArgumentType]
        return all(_fits(item, inner[0]) for item in items)
    if origin is dict:
        pairs: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else [(object(), None)]  # pyright: ignore[reportUnknownArgumentType]
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in pairs)
    if origin is Literal:
        return any(isinstance(value, type(choice)) and value == choice for choice in inner)
    return _KINDS[hint][1](value)


def _choices(hint: Any) -> list[str]:
    """Return the values of a Literal, or of a Literal or None."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [value for kind in inner for value in _choices(kind)]
    return [str(value) for value in inner] if origin is Literal else []


def _as_whole(value: Any) -> Any:
    """Return a value, or each one in a tuple or list, as an int where it is a float without a fraction."""
    if isinstance(value, (tuple, list)):
        return tuple(_as_whole(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    return int(value) if _is_real(value) and float(value).is_integer() else value


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(kind) for kind in inner)
    if origin is tuple:
        return f"a tuple, each item {_words(inner[0])}"
    if origin is dict:
        return f"a mapping from {_words(inner[0])} to {_words(inner[1])}"
    return " or ".join(map(repr, inner)) if origin is Literal else _KINDS[hint][0]
