"""Errors that end a run of either frontend."""

from __future__ import annotations


class NonFiniteGradientError(RuntimeError):
    """Gradients were not finite and their steps were skipped, too often for the run to go on."""
