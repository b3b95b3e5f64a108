"""Reports: what each check proves, what it found, and what cures it, as text or JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """What a check found."""

    passed: bool | None
    """None: the check does not apply, and ``said`` gives the reason."""
    said: str
    """The outcome in words, with its numbers."""
    numbers: dict[str, float] = {}  # noqa: RUF012
    warning: bool = False
    """The check passed, but what it saw may end a run."""


@dataclass(frozen=True)
class Check:
    """A check, and what its failure means."""

    name: str
    run: Callable[[Any], Finding]
    """Gets what is verified."""
    proves: str
    """What holds if it passes."""
    causes: str
    """What is usually wrong if it fails."""
    cure: str
    """The setting or change that cures it."""


@dataclass(frozen=True)
class Result:
    """A check and what it found."""

    name: str
    passed: bool | None
    """None: skipped."""
    said: str
    proves: str
    causes: str
    cure: str
    numbers: dict[str, float] = field(default_factory=dict)
    warning: bool = False
    """It passed, but what it saw may end a run."""

    @property
    def verdict(self) -> str:
        """The outcome in a word."""
        return "warning" if self.warning else {True: "passed", False: "FAILED", None: "skipped"}[self.passed]


@dataclass(frozen=True)
class Report:
    """The results of all checks."""

    subject: str
    """What was verified, in words."""
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """True if no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(result.name for result in self.results if result.passed is False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Names of the checks that passed with a warning."""
        return tuple(result.name for result in self.results if result.warning)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the checks that do not apply here."""
        return tuple(result.name for result in self.results if result.passed is None)

    def __getitem__(self, name: str) -> Result:
        """Return the result of a check by its name."""
        return next(result for result in self.results if result.name == name)

    def facts(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {"subject": self.subject, "passed": self.passed, "results": [asdict(result) for result in self.results]}

    def __str__(self) -> str:
        width = max(len(result.name) for result in self.results)
        lines = [self.subject, ""]
        for result in self.results:
            margin = " " * (width + 11)
            lines.append(f"{result.verdict:<7}  {result.name:<{width}}  {result.proves}")
            lines.append(f"{margin}{result.said}")
            if result.passed is False or result.warning:
                lines += [f"{margin}usual causes: {result.causes}", f"{margin}cure: {result.cure}"]
        others = {
            "failed": len(self.failures),
            f"warning{'s' * (len(self.warnings) > 1)}": len(self.warnings),
            "skipped": len(self.skipped),
        }
        counts = {"passed": len(self.results) - sum(others.values()), **others}
        return "\n".join([*lines, "", ", ".join(f"{n} {name}" for name, n in counts.items() if n)])


def run_check(check: Check, subject: Any) -> Result:
    """Run one check; an error in it is its failure, so that the others still speak."""
    try:
        found = check.run(subject)
    except Exception as error:  # whatever a model, tokenizer, reward or loss of the user raises
        found = Finding(False, f"raised {type(error).__name__}: {error}")
    texts = {"proves": check.proves, "causes": check.causes, "cure": check.cure}
    return Result(check.name, found.passed, found.said, **texts, numbers=found.numbers, warning=found.warning)
