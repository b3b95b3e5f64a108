"""YAML files: read a mapping, and refuse what YAML would take silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def load_yaml(path: Path) -> dict[Any, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ValueError: invalid YAML, not a mapping, or a duplicate key, of which YAML would silently keep the last.
    """
    try:
        content = _StrictLoader(path.read_text(encoding="utf-8")).get_single_data() or {}
    except _DoubleKeyError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # its constructors let a KeyError, RecursionError and others through
        raise ValueError(f"{path} is not valid YAML: {error or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {type(content).__name__}")
    return content


class _DoubleKeyError(Exception):
    pass


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise _DoubleKeyError(
                        f"{key.value!r} is given twice, in lines {seen[key.value]} and {line}: keep one of them"
                    )
                seen[key.value] = line
        return super().construct_mapping(node, deep)
