"""Errors that end a run of either frontend."""

from __future__ import annotations

import sys
import traceback


class RunError(RuntimeError):
    """A run failed although its input was valid; the command line prints the message and exits with 1."""


class NonFiniteGradientError(RunError):
    """Losses, gradients or weights were non-finite too often for the run to continue."""


class RatioTripwireError(RunError):
    """Old and new log-probs differ before any optimizer step: sampling and training disagree."""


class UnhealthyRunError(RunError):
    """The metrics show a symptom at which the settings stop a run (``watch``, ``stop_on``)."""


def print_failure(error: BaseException) -> int:
    """Print why a run failed, with the traceback of the user's own code where that raised; return the exit code 1.

    What was merely a bad answer, or a full disk, is in the message.
    """
    if error.__cause__ is not None and not isinstance(error, OSError):
        traceback.print_exception(error.__cause__)
    print(f"error: {error}", file=sys.stderr)
    return 1
