"""Write settings as YAML, with a comment at each argument that changed its meaning or has no counterpart."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from rlhf_ppo.config.migration_table import SOURCES, rows_of
from rlhf_ppo.migration.arguments import PAGES, known_fields
from rlhf_ppo.migration.converted import Converted
from rlhf_ppo.migration.reading import Given

_WHY = {"ignored": "their PPO ignores it too", "unsupported": "not supported", "automatic": "needs no setting"}


def as_yaml(given: Given, converted: Converted, defaults: Mapping[str, Any]) -> str:
    """Write the settings that differ from ``defaults``, with what is to be said about them and about the rest."""
    project, rows = SOURCES[given.source], rows_of(given.source)
    text = [
        f"# For `rlhf-ppo train --config THIS_FILE`, from {project}'s arguments in {given.origin}.",
        f"# Settings at their defaults are left out. {PAGES[given.source]} lists every argument and every difference.",
    ]
    explained: set[str] = set()
    for name, value in converted.settings.items():
        if name in defaults and value == defaults[name]:
            continue
        origins = [arg for arg, row in rows.items() if name in row.ours and row.fate in ("same", "converted")]
        named = [arg for arg in origins if arg in given.values]
        new = [arg for arg in named if rows[arg].fate == "converted" and arg not in explained | converted.silent]
        explained.update(new)
        text += [line for arg in new for line in ["", *_comment(given, arg)]]
        renamed = [arg for arg in named if rows[arg].fate == "same" and arg != name]
        why = converted.arithmetic.get(name) or ", ".join(renamed) or ("" if named else f"{project}'s default")
        text.append(f"{name}: {_plain(value)}" + (f"  # {why}" if why else ""))
    for name, what in converted.missing.items():
        text += ["", *_wrapped(f"{name}: {what}")]
    rest = list(_rest(given, converted, explained))
    if rest:
        text += ["", "# Arguments without a line above:"]
        text += [line for arg in rest for line in _comment(given, arg)]
    for arg, expression in given.unread.items():
        text += _wrapped(f"{arg}: {expression} is known to the running script alone; {_instead(given.source, arg)}")
    return "\n".join(text) + "\n"


def _rest(given: Given, converted: Converted, explained: set[str]) -> Iterator[str]:
    """Yield the arguments that no setting above stands for, and that differ from their default."""
    facts, rows = known_fields(given.source), rows_of(given.source)
    for arg in dict.fromkeys([*given.values, *converted.told]):
        changed = arg in given.values and given.values[arg] != facts[arg]["default"] and rows[arg].fate != "same"
        if arg in converted.told or (changed and arg not in explained | converted.silent):
            yield arg


def _instead(source: str, arg: str) -> str:
    ours = rows_of(source)[arg].ours
    return f"set {' or '.join(ours)}" if ours else "no setting needs it"


def _plain(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=1000, allow_unicode=True).strip()[1:-1]


def _comment(given: Given, arg: str) -> list[str]:
    row = rows_of(given.source)[arg]
    value = given.values.get(arg, known_fields(given.source)[arg]["default"])
    why = f" ({_WHY[row.fate]})" if row.fate in _WHY else ""
    return _wrapped(f"{arg}: {_plain(value)}{why}. {row.note}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=112, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)
