"""Arguments of the commands that read a run's folder, in both programs."""

from __future__ import annotations

from dataclasses import dataclass

import tyro


@dataclass(frozen=True, kw_only=True)
class AdviseArgs:
    """Read a run's metrics and suggest which settings to change."""

    run: tyro.conf.Positional[str]
    """Folder of a run (language model or classic), finished or not."""


@dataclass(frozen=True, kw_only=True)
class CheckArgs:
    """Verify all checkpoints of a run; exit code 1 if one is damaged."""

    run: tyro.conf.Positional[str]
    """Folder of a run (language model or classic), or one checkpoint-<n>."""
