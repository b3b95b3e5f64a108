"""Errors that end a run of either frontend."""

from __future__ import annotations


class NonFiniteGradientError(RuntimeError):
    """Losses, gradients or weights were non-finite too often for the run to continue."""


class RatioTripwireError(RuntimeError):
    """Old and new log-probs differ before any optimizer step: sampling and training disagree."""
