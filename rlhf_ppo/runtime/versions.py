"""Versions: of this package, and of what a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import version

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """This package's version, Python's, and those of installed packages."""
    return {"rlhf_ppo": __version__, **{name: version(name) for name in packages}, "python": platform.python_version()}
