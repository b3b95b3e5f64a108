"""Findings: what an examination says, each ok, a warning or a reason to stop, with its remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "warning", "stop"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    remedy: str = ""
    """What to change, by the names of settings."""


@dataclass
class Section:
    """One part of an examination."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)
    """Tables and histograms, as text."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The numbers behind them, for JSON."""

    def ok(self, what: str) -> None:
        """Add what is as it should be."""
        self.findings.append(Finding("ok", what))

    def warn(self, what: str, remedy: str) -> None:
        """Add what may go wrong."""
        self.findings.append(Finding("warning", what, remedy))

    def stop(self, what: str, remedy: str) -> None:
        """Add what makes a run fail, or learn nothing."""
        self.findings.append(Finding("stop", what, remedy))


@dataclass
class Examination:
    """All sections."""

    sections: list[Section] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """Those of all sections, in order."""
        return [finding for section in self.sections for finding in section.findings]

    @property
    def stops(self) -> list[Finding]:
        """Those that speak against the run."""
        return [finding for finding in self.findings if finding.level == "stop"]

    def text(self) -> str:
        """Return the examination as plain text."""
        warnings = sum(finding.level == "warning" for finding in self.findings)
        said = "do not start it yet" if self.stops else "it can start"
        counts = f"{_count(len(self.stops), 'reason')} to stop, {_count(warnings, 'warning')}: {said}"
        return "\n\n".join([*map(_section_text, self.sections), counts])

    def facts(self) -> dict[str, Any]:
        """Return the examination for JSON."""
        return {
            "can_start": not self.stops,
            "sections": [
                {"title": s.title, "findings": [vars(finding) for finding in s.findings], **s.facts}
                for s in self.sections
            ],
        }


def _section_text(section: Section) -> str:
    lines = [section.title]
    for finding in section.findings:
        lines.append(f"  {finding.level:<8} {finding.what}")
        if finding.remedy:
            lines.append(f"           -> {finding.remedy}")
    for page in section.pages:
        lines += ["", *(f"  {line}".rstrip() for line in page.splitlines())]
    return "\n".join(lines)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
