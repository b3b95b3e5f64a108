"""Help text of a command's settings: name, kind, sentence and default of each, in sections by theme."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import shutil
import sys
import textwrap
import types
import typing
from functools import cache
from typing import Any, Literal, NamedTuple

import tyro

FIRST = "Start here"
"""Title of the section with the settings that a beginner needs first (the class's table ``FIRST``)."""

_KINDS = {int: "INT", float: "NUMBER", str: "TEXT", bool: "{True,False}"}
_COLUMN = 34
_TIE = "\N{NO-BREAK SPACE}"


class Section(NamedTuple):
    """Settings of one theme."""

    title: str
    fields: list[dataclasses.Field[Any]]


def sentences(cls: type) -> dict[str, str]:
    """Return each field of a dataclass and its bases with the docstring under it, as one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found |= _own_sentences(base)
    return found


@cache
def _own_sentences(cls: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in itertools.pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(sentence))):
                found[name] = " ".join(sentence.split())
    return found


def sections(cls: type) -> list[Section]:
    """Return a dataclass's settings by theme: those in ``FIRST``, its own, then those of its bases in their order."""
    first: tuple[str, ...] = getattr(cls, "FIRST", ())
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    found = {FIRST: [fields[name] for name in first]} if first else {}
    for base in cls.__mro__:
        title = "Settings" if base is cls else (base.__doc__ or "").partition("\n")[0].partition(". ")[0].rstrip(".")
        for name, field in fields.items():
            if name not in first and _theme(cls, name) is base:
                found.setdefault(title, []).append(field)
    return [Section(title, members) for title, members in found.items()]


def _theme(cls: type, name: str) -> type:
    """Return the base that declares a setting; the class itself where no base does."""
    declaring = [base for base in cls.__mro__ if name in inspect.get_annotations(base)]
    return declaring[1] if declaring[0] is cls and len(declaring) > 1 else declaring[0]


def help_text(cls: type, *, prog: str, description: str, width: int | None = None) -> str:
    """Return what ``--help`` prints.

    Args:
        cls: the command's dataclass.
        prog: program and command.
        description: what the command does.
        width: columns; None: the terminal's, at most 120.
    """
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 120)
    bold = "\033[1m{}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else "{}"
    hints, said = typing.get_type_hints(cls, include_extras=True), sentences(cls)
    words = " ".join(name.upper() for name in positional(cls))
    parts = [f"usage: {prog} {words + ' ' if words else ''}[flags]", textwrap.fill(description, width)]
    for title, members in sections(cls):
        lines = [bold.format(title)]
        for field in members:
            flag = "  " + _flag(field, hints[field.name])
            text = said.get(field.name, "") + _default(field)
            wrapped = textwrap.wrap(text, width - _COLUMN, break_on_hyphens=False) or [""]
            wrapped = [line.replace(_TIE, " ") for line in wrapped]
            if len(flag) >= _COLUMN:
                lines.append(flag)
            else:
                lines.append(f"{flag:<{_COLUMN}}{wrapped.pop(0)}")
            lines += [" " * _COLUMN + line for line in wrapped]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def positional(cls: type) -> list[str]:
    """Return the settings that are words without a flag."""
    (marker,) = typing.get_args(tyro.conf.Positional[str])[1:]
    hints = typing.get_type_hints(cls, include_extras=True)
    return [name for name, hint in hints.items() if marker in typing.get_args(hint)[1:]]


def aliases(cls: type) -> dict[str, str]:
    """Return other name of a flag -> the setting."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {alias: name for name, hint in hints.items() for alias in _aliases(hint)}


def _aliases(hint: Any) -> tuple[str, ...]:
    extras = getattr(hint, "__metadata__", ())
    return tuple(alias for extra in extras for alias in getattr(extra, "aliases", None) or ())


def _flag(field: dataclasses.Field[Any], hint: Any) -> str:
    (marker,) = typing.get_args(tyro.conf.Positional[str])[1:]
    if marker in getattr(hint, "__metadata__", ()):
        return field.name.upper()
    names = ", ".join((f"--{field.name.replace('_', '-')}", *_aliases(hint)))
    return names if field.default is False else f"{names} {_kind(hint)}"


def _kind(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        own = [extra.metavar for extra in inner[1:] if isinstance(extra, tyro.constructors.PrimitiveConstructorSpec)]
        return own[0] if own else _kind(inner[0])
    if origin in (typing.Union, types.UnionType):
        return "|".join(dict.fromkeys(_kind(kind) for kind in inner if kind is not types.NoneType))
    if origin is tuple:
        return f"{_kind(inner[0])} ..."
    if origin is dict:
        return "NAME VALUE ..."
    return "{" + ",".join(map(str, inner)) + "}" if origin is Literal else _KINDS[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return " (required)"
    return "" if field.default in (None, ()) or field.default is False else f" (default:{_TIE}{field.default})"
