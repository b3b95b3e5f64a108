"""Errors that end a run of either frontend."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run failed although its input was valid; the command line prints the message and exits with 1."""


class NonFiniteGradientError(RunError):
    """Losses, gradients or weights were non-finite too often for the run to continue."""


class RatioTripwireError(RunError):
    """Old and new log-probs differ before any optimizer step: sampling and training disagree."""
