"""Documentation pages of settings, made from the dataclasses that the commands read: name, default and sentence."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from typing import Any

from rlhf_ppo.runtime.settings import Command


def sentences(cls: type) -> dict[str, str]:
    """Each field of a dataclass and its bases, with the docstring under it as one line, which is also its help."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in itertools.pairwise(definition.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(sentence))):
                    found[name] = " ".join(sentence.split())
    return found


def command_sections(prog: str, commands: Mapping[str, Command], stand_in: Mapping[str, Any] | None = None) -> str:
    """A section a command: its summary, then a table of its settings; those of an earlier command by name alone.

    Args:
        prog: the program, such as rlhf-ppo.
        commands: as in :func:`rlhf_ppo.runtime.settings.run_command`.
        stand_in: what holds in place of a default of None, by setting.
    """
    seen: dict[tuple[str, str], str] = {}
    sections: list[str] = []
    for command, (cls, _) in commands.items():
        described = sentences(cls)
        rows: list[str] = []
        shared: dict[str, list[str]] = {}
        for field in dataclasses.fields(cls):
            sentence = described[field.name].replace("|", "\\|")
            row = f"| `{field.name}` | {_default(field, stand_in or {})} | {sentence} |"
            if (owner := seen.setdefault((field.name, row), command)) == command:
                rows.append(row)
            else:
                shared.setdefault(owner, []).append(f"`{field.name}`")
        parts = [f"## `{prog} {command}`", (cls.__doc__ or "").strip().splitlines()[0]]
        if rows:
            parts.append("| setting | default | |\n|---|---|---|\n" + "\n".join(rows))
        parts += [f"As in `{owner}`: {', '.join(names)}." for owner, names in shared.items()]
        sections.append("\n\n".join(parts))
    return "\n\n".join(sections) + "\n"


def _default(field: dataclasses.Field[Any], stand_in: Mapping[str, Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    value = stand_in.get(field.name) if field.default is None else field.default
    return f"`{value}`"
