"""Errors between processes: what one process raised is raised on all of them, or ends all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.runtime.machine.signals import Interrupted

Agreed = Exception | Interrupted
"""What processes agree upon. A plain KeyboardInterrupt is a second signal, which ends its process at once."""


class Failure(NamedTuple):
    """Why the processes of a run end."""

    rank: int
    """Of the process that failed."""
    message: str
    exit_code: int
    speaker: int
    """Rank of the process that prints it."""


class OtherProcessError(RunError):
    """Another process has failed, was killed, or did not come; ``failure`` says which, and why."""

    def __init__(self, failure: Failure, size: int) -> None:
        self.failure = failure
        own = failure.message.startswith("process ")
        super().__init__(failure.message if own else f"process {failure.rank} of {size} failed: {failure.message}")


class RaisedElsewhereError(RunError):
    """The cause of an error that all processes raise, on those where it did not happen."""


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

    Only classes that are already imported here are looked up. Its cause is a :class:`RaisedElsewhereError`.
    """
    error = _same_class(facts) or RunError(f"process {rank} of {size} failed with {facts['name']}: {facts['message']}")
    error.__cause__ = RaisedElsewhereError(f"it was raised in process {rank} of {size}")
    return error


def _same_class(facts: dict[str, Any]) -> Agreed | None:
    kind = getattr(sys.modules.get(facts["module"]), facts["name"], None)
    if facts["args"] is not None and isinstance(kind, type) and issubclass(kind, Agreed):
        try:
            return kind(*facts["args"])
        except TypeError:
            pass  # its constructor takes something else
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def is_raised_elsewhere(error: BaseException) -> bool:
    """Whether all processes raise an error that happened in another one."""
    return any(isinstance(x, RaisedElsewhereError) for x in causes(error))


def is_of_a_collective(error: RuntimeError) -> bool:
    """Whether torch raised an error because another process was not there."""
    said = f"{type(error).__name__} {error}".lower()
    return any(word in said for word in ("gloo", "nccl", "distbackend", "closed by peer", "reset by peer"))


def describe(error: BaseException) -> str:
    """Return an error in one line of words."""
    if isinstance(error, (Interrupted, RunError)):
        return str(error)
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"


def exit_code(error: BaseException) -> int:
    """Return the exit code of a process that ends by ``error``, as the command line gives it."""
    if isinstance(error, OtherProcessError):
        return error.failure.exit_code
    if isinstance(error, KeyboardInterrupt):
        return error.exit_code if isinstance(error, Interrupted) else 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 2 if isinstance(error, (ValueError, FileNotFoundError, ModuleNotFoundError)) else 1
