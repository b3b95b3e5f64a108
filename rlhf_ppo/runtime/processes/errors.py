"""Errors between processes: what one process raised is raised on all of them."""

from __future__ import annotations

import sys
from typing import Any

from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.runtime.signals import Interrupted

Agreed = Exception | Interrupted
"""What processes agree upon. A plain KeyboardInterrupt is a second signal, which ends its process at once."""


def error_facts(error: Agreed) -> dict[str, Any]:
    """Describe an error for JSON: its class, and the arguments from which the others make their own."""
    plain = all(x is None or isinstance(x, (str, int, float)) for x in error.args)
    kind = type(error)
    return {
        "module": kind.__module__,
        "name": kind.__qualname__,
        "args": list(error.args) if plain else None,
        "message": str(error),
    }


def error_from_facts(facts: dict[str, Any], rank: int, size: int) -> Agreed:
    """Make the error that process ``rank`` described; a RunError where its class cannot be made from its arguments.

    Only classes that are already imported here are looked up.
    """
    kind = getattr(sys.modules.get(facts["module"]), facts["name"], None)
    if facts["args"] is not None and isinstance(kind, type) and issubclass(kind, Agreed):
        try:
            return kind(*facts["args"])
        except TypeError:
            pass  # its constructor takes something else
    return RunError(f"process {rank} of {size} failed with {facts['name']}: {facts['message']}")
