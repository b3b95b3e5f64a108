"""HTTP client: ask a reward server for scores, as JSON, and check every answer."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from functools import partial
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from rlhf_ppo.data.chat import Completion, Prompt
from rlhf_ppo.rewards.functions import StepRewards
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.command_line.user_code import start

TOKEN_VARIABLE = "RLHF_PPO_REWARD_TOKEN"
"""Environment variable with the bearer token; a token in the settings would be saved with them."""


class _TemporaryError(Exception):
    """Worth a retry: the server failed, the connection failed, or the answer took too long."""


class _Answer(NamedTuple):
    """What a server has said about a request."""

    rows: Sequence[Mapping[str, Any]]
    """A score, and perhaps extra columns, for each item in order."""
    metrics: Mapping[str, float]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Turn a redirect into an HTTPError: prompts and token go only to the given address."""


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
        parts = _parse_address(url)
        host = str(parts.hostname)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("concurrency", concurrency, 1),
            ("max_retries", max_retries, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        token = (token or os.environ.get(TOKEN_VARIABLE) or "").strip()
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ValueError(f"the token for {host} (or {TOKEN_VARIABLE}) has characters that a header cannot contain")
        self.url, self.timeout_s, self.max_retries, self.batch_size = url, timeout_s, max_retries, batch_size
        self.concurrency, self.backoff_s, self.max_answer_bytes = concurrency, backoff_s, max_answer_bytes
        self.__name__ = f"{parts.netloc}{parts.path}".rstrip("/")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        local = _is_loopback(host)
        if token and parts.scheme == "http" and not local:
            warnings.warn(f"the token for {host} is sent over http, unencrypted: use https", stacklevel=2)
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

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
        lanes = min(self.concurrency, len(batches))
        failed = threading.Event()
        limit = None if lanes == 1 else math.inf  # a single lane runs in this thread
        shares = [start(partial(self._ask_all, batches[lane::lanes], failed), limit) for lane in range(lanes)]
        done, _ = wait(shares, return_when=FIRST_EXCEPTION)
        for share in done:
            share.result()  # raises its error; the other lanes stop after their current request
        answers: list[_Answer] = [_Answer([], {})] * len(batches)
        for lane, share in enumerate(shares):
            answers[lane::lanes] = share.result()
        rows = [row for answer in answers for row in answer.rows]
        if log_extra is not None:
            for column in dict.fromkeys(column for row in rows for column in row.get("extra", {})):
                log_extra(column, [row.get("extra", {}).get(column) for row in rows])
        if log_metric is not None:
            for name in dict.fromkeys(name for answer in answers for name in answer.metrics):
                given = [(a.metrics[name], len(a.rows)) for a in answers if name in a.metrics]
                log_metric(name, sum(value * count for value, count in given) / sum(count for _, count in given))
        return [_score(row["score"]) for row in rows]

    def _ask_all(self, batches: Sequence[list[dict[str, Any]]], failed: threading.Event) -> list[_Answer]:
        """Ask about one batch after another, until one fails in any lane."""
        answers: list[_Answer] = []
        for items in batches:
            if failed.is_set():
                break
            try:
                answers.append(self._in_order([item["id"] for item in items], self._ask(items)))
            except BaseException:
                failed.set()
                raise
        return answers

    def _ask(self, items: list[dict[str, Any]]) -> Any:
        try:
            body = json.dumps({"items": items}, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise self._error(f"a prompt or column cannot be sent as JSON: {error}") from None
        attempts = self.max_retries + 1
        for attempt in range(attempts):
            try:
                return self._read(self._post(body))
            except _TemporaryError as error:
                if attempt + 1 == attempts:
                    raise self._error(f"no answer after {attempts} attempts; the last failed: {error}") from None
                time.sleep(min(30.0, self.backoff_s * 2**attempt))
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: bytes) -> bytes:
        deadline = time.monotonic() + self.timeout_s
        request = urllib.request.Request(self.url, data=body, headers=self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                body = self._body(response.read1, deadline)
                if response.length:
                    raise _TemporaryError(f"the answer was cut off {response.length} bytes before its end")
                return body
        except urllib.error.HTTPError as error:
            with error:
                if error.code >= 500:
                    raise _TemporaryError(f"HTTP {error.code} {error.reason}") from None
                if 300 <= error.code < 400:
                    to = error.headers.get("Location", "nowhere")
                    raise self._error(f"HTTP {error.code} points to {to}: redirects are not followed") from None
                hint = f" (is {TOKEN_VARIABLE} right?)" if error.code in (401, 403) else ""
                said = error.read(200).decode("utf-8", "replace")
                raise self._error(f"HTTP {error.code} {error.reason}{hint}: {said!r}") from None
        except (OSError, HTTPException) as error:  # refused, unknown host, cut off, timed out, not HTTP
            raise _TemporaryError(f"{type(error).__name__}: {error}") from None

    def _body(self, read1: Callable[[int], bytes], deadline: float) -> bytes:
        body = b""
        while chunk := read1(65536):
            body += chunk
            if len(body) > self.max_answer_bytes:
                raise self._error(f"the answer is longer than max_answer_bytes={self.max_answer_bytes}")
            if time.monotonic() > deadline:  # the socket's own timeout restarts with each chunk
                raise _TemporaryError(f"the answer took longer than {self.timeout_s} seconds")
        return body

    def _read(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise self._error(f"the answer is not JSON: {body[:200]!r}") from None

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


def _parse_address(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for an invalid port
    except ValueError as error:
        raise ValueError(f"reward server {url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"reward server {url!r}: an address looks like http://127.0.0.1:8000 or https://host/path")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"reward server {parts.hostname!r}: a user name or password in the address would be logged with it; "
            f"put a token into {TOKEN_VARIABLE}"
        )
    return parts


def _score(value: Any) -> Any:
    """Decode steps from JSON; anything else is checked with the scores of all reward functions."""
    if isinstance(value, Mapping) and set(value) == {"steps"} and isinstance(value["steps"], list):
        return StepRewards(value["steps"])
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
