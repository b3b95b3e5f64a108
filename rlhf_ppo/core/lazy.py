"""Lazy names: load what a package offers when it is first used, so that importing the package is cheap."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str], modules: str = "") -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that imports each name from its home when it is first used.

    Args:
        package: the module's ``__name__``.
        homes: name -> module that defines it.
        modules: the package's modules that can be used without an import of their own, separated by spaces.
    """
    own = modules.split()

    def get(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(homes[name]), name)
        if name in own:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
