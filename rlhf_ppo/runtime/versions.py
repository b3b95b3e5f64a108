"""Versions: what a run was made with, for its run.json."""

from __future__ import annotations

import platform
from importlib.metadata import version

from rlhf_ppo import __version__


def versions(*packages: str) -> dict[str, str]:
    """This package's version, Python's, and those of installed packages."""
    return {"rlhf_ppo": __version__, **{name: version(name) for name in packages}, "python": platform.python_version()}
