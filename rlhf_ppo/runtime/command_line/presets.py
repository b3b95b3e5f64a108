"""Presets: named YAML files of settings, which a YAML file of one's own and flags override."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def preset_names(folder: Path) -> list[str]:
    """Return the names of the presets in a folder."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def find_preset(folder: Path, name: str) -> Path:
    """Return a preset's file.

    Raises:
        ValueError: no such preset; lists the known ones, and the closest.
    """
    known = preset_names(folder)
    if name in known:
        return folder / f"{name}.yaml"
    close = difflib.get_close_matches(name, known, n=1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown preset {name!r}{meant}; known: {', '.join(known)}")


@contextmanager
def naming_preset(name: str | None, settings: Mapping[str, Any], given: Collection[str]) -> Iterator[None]:
    """Where settings contradict each other, add which of them a preset has set.

    Args:
        name: the preset; None: there is none.
        settings: what it sets.
        given: the settings that were given beside it, which override its own.
    Raises:
        ValueError: what was raised inside; where it names settings of the preset, they and those given come first.
    """
    try:
        yield
    except ValueError as error:
        ours = [f"{key}={value!r}" for key, value in settings.items() if key not in given and _names(error, key)]
        if name is None or not ours:
            raise
        theirs = [key for key in given if _names(error, key)]
        against = f" and you set {', '.join(theirs)}" if theirs else ""
        raise ValueError(f"preset {name!r} sets {', '.join(ours)}{against}: {error}") from None


def _names(error: ValueError, setting: str) -> bool:
    return re.search(rf"\b{setting}=", str(error)) is not None
