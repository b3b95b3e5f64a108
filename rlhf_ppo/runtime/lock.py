"""One run per output folder: a lock that the system releases when the process ends, however it ends."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

LOCK_FILE = "run.lock"


class RunLockedError(ValueError):
    """Another run is writing into the folder."""


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Hold a run's folder while this lasts. The file stays; what counts is the system's lock on it.

    Where the system has no such locks nothing is held: on a network file system with a warning.

    Raises:
        RunLockedError: another run holds it; names its process.
    """
    if fcntl is None:
        yield
        return
    file = Path(folder) / LOCK_FILE
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise RunLockedError(
                f"{folder} is in use by another run (process {holder}): wait for it, stop it, or name another "
                "output_dir"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{file} cannot be locked ({error.strerror}): make sure that no other run writes here", stacklevel=3
            )
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
