"""Processes: a run is one process; a launcher's variables that promise more are refused before any work is done."""

from __future__ import annotations

import os

VARIABLE = "WORLD_SIZE"
"""What torchrun and accelerate set to the number of processes they start."""


def require_one_process() -> None:
    """Raise a ValueError unless the environment says that this process runs alone.

    Several processes are not supported yet: each would train a model of its own in the same folder.
    """
    given = os.environ.get(VARIABLE, "1").strip()
    if given.isdecimal() and int(given) == 1:
        return
    raise ValueError(
        f"{VARIABLE}={given!r} in the environment promises several processes, but training over several processes is "
        f"not supported: start one process, without torchrun or accelerate launch (or unset {VARIABLE})"
    )
