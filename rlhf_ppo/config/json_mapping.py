"""JsonMapping: a setting that is a mapping in Python and YAML, and JSON text as a flag."""

from __future__ import annotations

import json
from typing import Annotated, Any

import tyro


def _read(words: list[str]) -> dict[str, Any] | None:
    if words == ["None"]:
        return None
    try:
        value = json.loads(words[0])
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'it must be a JSON mapping such as {{"enable_thinking": false}}, got {words[0]!r}')
    return value


JsonMapping = Annotated[
    dict[str, Any] | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_read,
        is_instance=lambda value: value is None or isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]
