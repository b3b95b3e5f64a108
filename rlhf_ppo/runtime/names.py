"""Names: what a setting or an argument that is not here could have meant, by its spelling or in other libraries."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any


def hint(name: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """What an unknown name could have meant, as the end of a message; "" if nothing comes near it.

    Args:
        name: what is not among the known.
        known: names that there are.
        elsewhere: another library's name -> ours, or why there is none.
    """
    if elsewhere is not None and name in elsewhere:
        return f": {elsewhere[name]}"
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse(cls: type, names: Iterable[str], *, where: str = "") -> None:
    """Say why settings of other libraries are not here, or what they are called.

    Args:
        cls: dataclass with the tables ``REFUSED`` (name -> reason) and ``ELSEWHERE`` (name -> ours), if it has them.
        names: of settings that someone gives.
        where: begins the message.
    Raises:
        ValueError: one of them is in a table, and no field.
    """
    refused: Mapping[str, str] = getattr(cls, "REFUSED", {})
    elsewhere: Mapping[str, str] = getattr(cls, "ELSEWHERE", {})
    fields = {field.name for field in dataclasses.fields(cls)}
    for name in names:
        if name in refused:
            raise ValueError(f"{where}{name} is not supported: {refused[name]}")
        if name in elsewhere and name not in fields:
            raise ValueError(f"{where}{name} is no setting: {elsewhere[name]}")


def refuse_unknown_settings(cls: type, given: Iterable[str]) -> None:
    """Raise a TypeError, as Python would, for names that are no fields of a dataclass, with what they could have meant.

    Raises:
        ValueError: the setting is refused for a reason.
    """
    refused: Mapping[str, str] = getattr(cls, "REFUSED", {})
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for name in given:
        if name in refused:
            raise ValueError(f"{name} is not supported: {refused[name]}")
        if name not in known:
            raise TypeError(f"{cls.__name__} has no setting {name!r}{hint(name, known, getattr(cls, 'ELSEWHERE', {}))}")


def refuse_unknown_arguments(function: Any, name: str, given: Iterable[str], elsewhere: Mapping[str, str]) -> None:
    """Likewise for the arguments of a class or function, called ``name`` in the message."""
    known = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
    for argument in given:
        if argument not in known:
            raise TypeError(f"{name} has no argument {argument!r}{hint(argument, known, elsewhere)}")
