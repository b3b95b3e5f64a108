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


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Write one HTML file about a run, or about several and where they differ; it works offline."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs (language model or classic), finished or not."""
    output: str | None = None
    """The file. None: report.html in the run's folder; for several runs, beside the first one's folder."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("nothing to report: name at least one run's folder")
