"""Explain unknown settings and arguments: suggest the name that was meant, by spelling or from other libraries."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any


def hint(name: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """Suggest what an unknown name could have meant, as the end of a message; "" if nothing is close.

    Args:
        name: the unknown name.
        known: the valid names.
        elsewhere: name in another library -> its name here, or why it does not exist here.
    """
    if elsewhere is not None and name in elsewhere:
        return f": {elsewhere[name]}"
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse(cls: type, given: Mapping[str, Any], *, where: str = "") -> None:
    """Refuse settings and values that do not exist here but did earlier, or do in other libraries.

    Args:
        cls: dataclass with the tables ``REFUSED`` (name -> reason), ``REFUSED_VALUES`` (name -> value -> what to do
            instead) and ``ELSEWHERE`` (name -> ours), if it has them.
        given: setting -> value that a user gives.
        where: begins the message.
    Raises:
        ValueError: one of them is in a table and is no field; says why, or what it is called here.
    """
    elsewhere: Mapping[str, str] = getattr(cls, "ELSEWHERE", {})
    fields = {field.name for field in dataclasses.fields(cls)}
    _refuse_removed(cls, given, where)
    for name in given:
        if name in elsewhere and name not in fields:
            raise ValueError(f"{where}{name} is no setting: {elsewhere[name]}")


def _refuse_removed(cls: type, given: Mapping[str, Any], where: str = "") -> None:
    refused: Mapping[str, str] = getattr(cls, "REFUSED", {})
    values: Mapping[str, Mapping[str, str]] = getattr(cls, "REFUSED_VALUES", {})
    for name, value in given.items():
        if name in refused:
            raise ValueError(f"{where}{name} is not supported: {refused[name]}")
        if name in values and str(value) in values[name]:
            raise ValueError(f"{where}{name}={value!r} has been removed: {values[name][str(value)]}")


def refuse_unknown_settings(cls: type, given: Mapping[str, Any]) -> None:
    """Raise a TypeError, as Python would, for names that are not fields of a dataclass; suggests the closest.

    Raises:
        ValueError: the setting, or its value, is refused for a reason.
    """
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    _refuse_removed(cls, given)
    for name in given:
        if name not in known:
            raise TypeError(f"{cls.__name__} has no setting {name!r}{hint(name, known, getattr(cls, 'ELSEWHERE', {}))}")


def refuse_unknown_arguments(function: Any, name: str, given: Iterable[str], elsewhere: Mapping[str, str]) -> None:
    """Raise a TypeError for unknown arguments of a class or function, called ``name`` in the message."""
    known = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
    for argument in given:
        if argument not in known:
            raise TypeError(f"{name} has no argument {argument!r}{hint(argument, known, elsewhere)}")
