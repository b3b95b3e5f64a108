"""Voice: what all processes of a run would say is said by one of them, once."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_ppo.runtime.processes.errors import OtherProcessError, exit_code, is_raised_elsewhere
from rlhf_ppo.runtime.processes.launch import is_launched_after_the_first
from rlhf_ppo.runtime.processes.watch import Watch

_watch: Watch | None = None


def settle(error: BaseException) -> tuple[bool, int]:
    """Return whether this process is to print ``error``, by which it ends, and its exit code; tells the others."""
    if _watch is None:
        # Without a watch all that can fail is what fails likewise in each process.
        return not is_launched_after_the_first(), exit_code(error)
    if is_raised_elsewhere(error):
        return False, exit_code(error)
    failure = error.failure if isinstance(error, OtherProcessError) else _watch.fail(error)
    return failure.speaker == _watch.rank, failure.exit_code


def may_say(text: str) -> bool:
    """Return whether no other process has said ``text``."""
    return not is_launched_after_the_first() if _watch is None else _watch.may_say(text)


@contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process alone print during the block, in which all print the same."""
    if not is_launched_after_the_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def share_voice(watch: Watch) -> None:
    """Print errors that end a script, and warnings, once; ``watch`` knows what the others have said."""
    global _watch
    _watch = watch
    print_error, show = sys.excepthook, warnings.showwarning

    def print_error_once(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if settle(error)[0]:
            print_error(kind, error, trace)

    def show_once(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if watch.may_say(f"{category.__name__} {message} {filename} {lineno}"):
            show(message, category, filename, lineno, *rest)

    sys.excepthook = print_error_once
    warnings.showwarning = show_once
