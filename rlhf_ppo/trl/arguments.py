"""Read the arguments of a TRL 1.12 PPO run, from YAML and flags, checked against the real classes' fields."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlhf_ppo.config.trl_names import CLASSES
from rlhf_ppo.runtime.command_line.settings import load_yaml

FIELDS_FILE = Path(__file__).parents[1] / "assets" / "trl-1.12-ppo-fields.json"
"""Types, defaults and choices of the real classes' fields; made by `make trl-fields`."""

_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list[str], "dict": dict, "null": None}


@cache
def known_fields() -> dict[str, dict[str, Any]]:
    """Return ``{field: {"kinds": [...], "default": ..., "choices": [...]}}`` of all three classes."""
    classes = json.loads(FIELDS_FILE.read_text(encoding="utf-8"))
    return {name: facts for cls in CLASSES for name, facts in classes[cls].items()}


def read_trl_yaml(path: str | Path) -> dict[str, Any]:
    """Read the fields in a YAML file for TRL's parser, except ``env``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping, an unknown field (with the closest known one), or a value of the wrong type.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    content = load_yaml(Path(path))
    return {name: _checked(name, value, f"{path}: ") for name, value in content.items() if name != "env"}


def read_trl_flags(text: str) -> dict[str, Any]:
    """Read the fields in a command line for TRL's scripts, after its launcher and script name (``... ppo.py``) if any.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_trl_yaml`; a ``--config`` among the flags is read too.
    """
    _, words = _launcher_and_flags(text)
    if words and not words[0].startswith("--"):
        raise ValueError(f"TRL's flags begin with --, got {words[0]!r}")
    flags: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = [value] if equals else []
        else:
            flags[name].append(word)
    from_file = read_trl_yaml(_one("config", flags.pop("config"))) if "config" in flags else {}
    return from_file | dict(_flag(name, values) for name, values in flags.items())


def launched_processes(text: str) -> int:
    """Return the number of processes that the launcher before the script names, or 1."""
    launcher = " ".join(_launcher_and_flags(text)[0])
    found = re.findall(r"--(?:num[-_]processes|nproc[-_]per[-_]node)[= ](\d+)", launcher)
    return int(found[-1]) if found else 1


def _launcher_and_flags(text: str) -> tuple[list[str], list[str]]:
    words = shlex.split(text.replace("\\\n", " "))
    after = 1 + max((i for i, word in enumerate(words) if word.endswith(".py")), default=-1)
    return words[:after], words[after:]


def _flag(name: str, values: list[str]) -> tuple[str, Any]:
    name = name.replace("-", "_")
    known = known_fields()
    if name.startswith("no_") and name not in known and known.get(name[3:], {}).get("default") is True and not values:
        return name[3:], False
    if name in known and not values and "bool" in known[name]["kinds"]:
        return name, True
    listed = name in known and "list" in known[name]["kinds"] and len(values) > 1
    return name, _checked(name, values if listed or name not in known else _one(name, values), "--")


def _one(name: str, values: list[str]) -> str:
    if len(values) != 1:
        raise ValueError(f"--{name} takes one value, got {values}")
    return values[0]


def _checked(name: Any, value: Any, where: str) -> Any:
    known = known_fields()
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "; docs/migrating-from-trl.md lists the known ones"
        raise ValueError(f"{where}{name}: not a field of TRL 1.12's PPO arguments{hint}")
    kinds, choices = known[name]["kinds"], known[name].get("choices")
    if isinstance(value, str) and "list" in kinds and "str" not in kinds:
        value = [value]
    try:
        value = TypeAdapter(reduce(or_, (_TYPES[kind] for kind in kinds))).validate_python(value)
    except ValidationError:
        raise ValueError(f"{where}{name}: takes {' or '.join(kinds)}, got {value!r}") from None
    if choices and value is not None and value not in choices:
        raise ValueError(f"{where}{name}: {value!r} is none of {', '.join(choices)}")
    return value
