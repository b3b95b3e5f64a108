"""Errors that end a run of either frontend."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run ended although its input was good; the command line prints the message and exits with 1."""


class NonFiniteGradientError(RunError):
    """Losses, gradients or weights were not finite, too often for the run to go on."""


class RatioTripwireError(RunError):
    """Old and new log-probs differ before any optimizer step: sampling and training disagree."""
