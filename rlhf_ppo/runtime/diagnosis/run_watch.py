"""RunWatch: judge a run by the rules of :mod:`rlhf_ppo.runtime.diagnosis.rules` while it trains, each symptom once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_ppo.runtime.diagnosis.advice import Advice, judge
from rlhf_ppo.runtime.diagnosis.rules import RULES, Rule
from rlhf_ppo.runtime.diagnosis.symptoms import RunMetrics

RECENT = 10
"""Updates that count as now, and as the start."""

PATIENCE = 3
"""Consecutive updates that must show a symptom."""


class RunWatch:
    """The first and the latest updates of a run, and what has been said about them."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        earlier: Sequence[Mapping[str, float]] = (),
        said: Iterable[str] = (),
        updates: int = 0,
    ) -> None:
        """Start watching.

        Args:
            settings: the run's, by name.
            earlier: lines of metrics.jsonl before a run was resumed: its start is compared with.
            said: names of the rules that need not be said again.
            updates: how many this process has watched of a run that was rolled back.
        """
        self.settings = dict(settings)
        self._first: list[dict[str, float]] = []
        self._last: deque[dict[str, float]] = deque(maxlen=RECENT)
        self.updates = updates
        """Updates watched by this process."""
        self._consecutive: dict[str, int] = {}
        self._said = set(said)
        for row in earlier:
            if self._counts(row) and len(self._first) < RECENT:
                self._first.append(dict(row))

    def add(self, metrics: Mapping[str, float]) -> list[Advice]:
        """Add an update's metrics; return advice on each symptom that they confirm, most serious first."""
        if not self._counts(metrics):
            return []
        (self._first if len(self._first) < RECENT else self._last).append(dict(metrics))
        self.updates += 1
        run = RunMetrics([*self._first, *self._last], self.settings)
        return [advice for rule in RULES if (advice := self._judge(rule, run)) is not None]

    def _judge(self, rule: Rule, run: RunMetrics) -> Advice | None:
        if rule.watched is None or rule.name in self._said or self.updates < rule.after:
            return None
        found = judge(rule, run)
        seen = 0 if found is None else self._consecutive.get(rule.name, 0) + 1
        self._consecutive[rule.name] = seen
        if seen < PATIENCE:
            return None
        self._said.add(rule.name)
        return found

    def _counts(self, metrics: Mapping[str, float]) -> bool:
        """Whether this is an update in which the policy learned."""
        warmup = self.settings.get("critic_warmup_rollouts") or 0
        return "policy/loss" in metrics and metrics["progress/iteration"] > warmup
