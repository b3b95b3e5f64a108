"""Documentation pages of settings, made from the dataclasses that the commands read: name, default and sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhf_ppo.runtime.command_line.settings import Command
from rlhf_ppo.runtime.command_line.settings_help import sections, sentences


def command_sections(prog: str, commands: Mapping[str, Command], stand_in: Mapping[str, Any] | None = None) -> str:
    """Return a section per command: its summary, then a table per theme; settings of an earlier command by name alone.

    Args:
        prog: the program, such as rlhf-ppo.
        commands: as in :func:`rlhf_ppo.runtime.command_line.settings.run_command`.
        stand_in: what to show in place of a default of None, by setting.
    """
    seen: dict[tuple[str, str], str] = {}
    parts: list[str] = []
    for command, (cls, _) in commands.items():
        described = sentences(cls)
        shared: dict[str, list[str]] = {}
        parts += [f"## `{prog} {command}`", (cls.__doc__ or "").strip().splitlines()[0]]
        themes = sections(cls)
        for title, fields in themes:
            rows: list[str] = []
            for field in fields:
                sentence = described[field.name].replace("|", "\\|")
                row = f"| `{field.name}` | {_default(field, stand_in or {})} | {sentence} |"
                if (owner := seen.setdefault((field.name, row), command)) == command:
                    rows.append(row)
                else:
                    shared.setdefault(owner, []).append(f"`{field.name}`")
            if rows:
                parts += [f"### {title}"] * (len(themes) > 1)
                parts.append("| setting | default | |\n|---|---|---|\n" + "\n".join(rows))
        parts += [f"As in `{owner}`: {', '.join(names)}." for owner, names in shared.items()]
    return "\n\n".join(parts) + "\n"


def _default(field: dataclasses.Field[Any], stand_in: Mapping[str, Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    value = stand_in.get(field.name) if field.default is None else field.default
    return f"`{value}`"
