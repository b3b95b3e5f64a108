"""HTTP client: ask a reward server for scores, as JSON, and check every answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_ppo.data.chat import Completion, Prompt
from rlhf_ppo.rewards.functions import StepRewards
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.http_json import JSONClient, RequestError, in_lanes

TOKEN_VARIABLE = "RLHF_PPO_REWARD_TOKEN"
"""Environment variable with the bearer token; a token in the settings would be saved with them."""


class _Answer(NamedTuple):
    """What a server has said about a request."""

    rows: Sequence[Mapping[str, Any]]
    """A score, and perhaps extra columns, for each item in order."""
    metrics: Mapping[str, float]


class HTTPReward:
    """A reward function that asks a server for scores.

    Request: POST ``{"items": [{"id", "prompt", "completion", "columns"}]}``; answer: ``{"scores": [{"id", "score"}]}``
    in any order. A score is a number, null (cannot be scored) or ``{"steps": [[end, score], ...]}`` (see
    :class:`rlhf_ppo.StepRewards`). An answer may have ``"metrics": {name: number}``, and a score ``"extra": {column:
    value}``: they are logged as a reward function's are.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 3,
        batch_size: int = 64,
        concurrency: int = 4,
        backoff_s: float = 0.5,
        max_answer_bytes: int = 16 * 2**20,
    ) -> None:
        """Check the address and the limits; send nothing yet.

        Args:
            url: an http or https address.
            token: sent as ``Authorization: Bearer``; None: the value of ``RLHF_PPO_REWARD_TOKEN``, if set.
            timeout_s: timeout of one request in seconds, from connecting to the last byte of the answer.
            max_retries: retries after a 5xx answer, a timeout or a failed connection; other failures are not retried.
            batch_size: at most this many completions per request.
            concurrency: at most this many simultaneous requests.
            backoff_s: pause before the first retry in seconds; it doubles each time, up to 30.
            max_answer_bytes: a longer answer is an error.
        Raises:
            ValueError: an invalid address, number or token.
        """
        for name, value in (("batch_size", batch_size), ("concurrency", concurrency)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self._client = JSONClient(
            url,
            what="reward server",
            token_variable=TOKEN_VARIABLE,
            token=token,
            timeout_s=timeout_s,
            max_retries=max_retries,
            backoff_s=backoff_s,
            max_answer_bytes=max_answer_bytes,
        )
        self.url, self.batch_size, self.concurrency = url, batch_size, concurrency
        self.__name__ = self._client.name

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, Sequence[Any]], None] | None = None,
        **columns: Sequence[Any],
    ) -> list[float | StepRewards | None]:
        """Ask for scores, ``batch_size`` completions per request, ``concurrency`` requests at a time.

        Args:
            prompts, completions, columns: what the server receives.
            log_metric, log_extra: log what the server has logged.
        Raises:
            RewardError: no answer after all retries, a refusal, or an answer without exactly one score per id.
        """
        columns = {name: values for name, values in columns.items() if name != "completion_ids"}
        items = [
            {
                "id": str(i),
                "prompt": prompt,
                "completion": completion,
                "columns": {name: values[i] for name, values in columns.items()},
            }
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        batches = [items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size)]
        answers = in_lanes(self._answer, batches, self.concurrency)
        rows = [row for answer in answers for row in answer.rows]
        if log_extra is not None:
            for column in dict.fromkeys(column for row in rows for column in row.get("extra", {})):
                log_extra(column, [row.get("extra", {}).get(column) for row in rows])
        if log_metric is not None:
            for name in dict.fromkeys(name for answer in answers for name in answer.metrics):
                given = [(a.metrics[name], len(a.rows)) for a in answers if name in a.metrics]
                log_metric(name, sum(value * count for value, count in given) / sum(count for _, count in given))
        return [_score(row["score"]) for row in rows]

    def _answer(self, items: list[dict[str, Any]]) -> _Answer:
        try:
            answer = self._client.post("", {"items": items})
        except RequestError as error:
            raise self._error(str(error)) from None
        return self._in_order([item["id"] for item in items], answer)

    def _in_order(self, ids: Sequence[str], answer: Any) -> _Answer:
        """Read an answer in any order; its rows are returned in the order of ``ids``."""
        rows = answer.get("scores") if isinstance(answer, Mapping) else None
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "score" in row for row in rows):
            raise self._error(f'expected {{"scores": [{{"id", "score"}}]}}, got {answer!r:.200}')
        got = [row.get("id") for row in rows]
        for what, wrong in (
            ("missing", [i for i in ids if i not in got]),
            ("unknown", [i for i in got if i not in ids]),
            ("duplicate", [i for i in ids if got.count(i) > 1]),
        ):
            if wrong:
                raise self._error(f"the answer has {what} ids: {wrong!r:.200}")
        metrics = answer.get("metrics", {})
        if not isinstance(metrics, Mapping) or any(type(x) not in (int, float) for x in metrics.values()):
            raise self._error(f'"metrics" must be {{name: number}}, got {metrics!r:.200}')
        for row in rows:
            if not isinstance(row.get("extra", {}), Mapping):
                raise self._error(f'"extra" of a score must be {{column: value}}, got {row["extra"]!r:.200}')
        by_id = {row["id"]: row for row in rows}
        return _Answer([by_id[i] for i in ids], metrics)

    def _error(self, message: str) -> RewardError:
        return RewardError(f"reward server {self.__name__}: {message}")


def _score(value: Any) -> Any:
    """Decode steps from JSON; anything else is checked with the scores of all reward functions."""
    if isinstance(value, Mapping) and set(value) == {"steps"} and isinstance(value["steps"], list):
        return StepRewards(value["steps"])
    return value
