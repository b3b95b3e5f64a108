"""Errors of environments: what a crash raises, and what it is reported as."""

from __future__ import annotations

CRASHES = (Exception, SystemExit)
"""What a crashing environment raises: sys.exit() in one must not end a run as if it had gone well."""


class BrokenEnvironmentError(RuntimeError):
    """An environment crashed or returned something that cannot be learned from; says which one, and at which step."""
