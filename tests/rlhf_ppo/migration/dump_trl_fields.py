"""Print the fields of TRL 1.12's PPO arguments as JSON, from an environment that has trl: see `make trl-fields`.

The answer is rlhf_ppo/assets/trl-1.12-ppo-fields.json: name, kind of value and default of every field that
TRL's PPO script takes, for `rlhf-ppo migrate`, its page and its tests, none of which need trl.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from typing import Any

import transformers
import trl
from trl import ModelConfig, ScriptArguments
from trl.experimental.ppo import PPOConfig

CLASSES = (PPOConfig, ModelConfig, ScriptArguments)
SCALARS = (bool, int, float, str, list, dict)


def parts(hint: Any) -> list[Any]:
    """The alternatives of a type hint: `str | None` is two."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [part for choice in typing.get_args(hint) for part in parts(choice)] if union else [hint]


def choices(field: dataclasses.Field, hint: Any) -> list[str] | None:
    """The words that a field accepts, where it accepts only some."""
    for part in parts(hint):
        if typing.get_origin(part) is typing.Literal and all(isinstance(x, str) for x in typing.get_args(part)):
            return list(typing.get_args(part))
        if isinstance(part, enum.EnumMeta):
            return [member.value for member in part]
    words = field.metadata.get("choices")
    return list(words) if words else None


def kinds(hint: Any) -> list[str]:
    """Kinds of value that a field accepts, as JSON and the command line know them."""
    found = []
    for part in parts(hint):
        base = typing.get_origin(part) or part
        if base is typing.Literal:
            found += [type(x).__name__ for x in typing.get_args(part)]
        elif base in SCALARS:
            found.append(base.__name__)
        elif isinstance(base, enum.EnumMeta):
            found.append("str")
        elif base is type(None):
            found.append("null")
    return sorted(set(found))


def default(field: dataclasses.Field) -> Any:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return value.value if isinstance(value, enum.Enum) else value


def describe(cls: type) -> dict[str, dict[str, Any]]:
    hints = typing.get_type_hints(cls)
    found: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(cls):
        if field.init:
            found[field.name] = {"kinds": kinds(hints[field.name]), "default": default(field)}
            if words := choices(field, hints[field.name]):
                found[field.name]["choices"] = words
    return dict(sorted(found.items()))


if __name__ == "__main__":
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    fields = {cls.__name__: describe(cls) for cls in CLASSES}
    # One field a line, so that a change of one field is a change of one line.
    lines = [
        f'  "{name}": {{\n' + ",\n".join(f'    "{f}": {json.dumps(d)}' for f, d in described.items()) + "\n  }"
        for name, described in fields.items()
    ]
    print("{\n" + f'  "versions": {json.dumps(versions)},\n' + ",\n".join(lines) + "\n}")
