"""JSON over HTTP: ask a server, with bounded retries, and take only a whole answer in time; many requests at once."""

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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from functools import partial
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from rlhf_ppo.runtime.command_line.user_code import start

Item = TypeVar("Item")
Result = TypeVar("Result")


class RequestError(Exception):
    """A request failed: after all retries, or for a reason that no retry removes."""

    def __init__(self, message: str, status: int | None = None, said: str = "") -> None:
        super().__init__(message)
        self.status, self.said = status, said
        """Of the answer, if there was one: its HTTP status and the start of its text."""


class _TemporaryError(RequestError):
    """Worth a retry: the server failed, the connection failed, or the answer took too long."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Turn a redirect into an HTTPError: what is sent, and the token, go only to the given address."""


class JSONClient:
    """A server that answers JSON with JSON."""

    def __init__(
        self,
        url: str,
        *,
        what: str,
        token_variable: str,
        token: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 3,
        backoff_s: float = 0.5,
        max_answer_bytes: int = 16 * 2**20,
    ) -> None:
        """Check the address and the limits; send nothing yet.

        Args:
            url: an http or https address; each request adds its path to it.
            what: what the server is, for messages, such as "reward server".
            token_variable: environment variable with the bearer token; one in the settings would be saved with them.
            token: sent as ``Authorization: Bearer``; None: the value of ``token_variable``, if set.
            timeout_s: timeout of one request in seconds, from connecting to the last byte of the answer.
            max_retries: retries after a 5xx answer, a timeout or a failed connection; other failures are not retried.
            backoff_s: pause before the first retry in seconds; it doubles each time, up to 30.
            max_answer_bytes: a longer answer is an error.
        Raises:
            ValueError: an invalid address, number or token.
        """
        parts = _parse_address(url, what, token_variable)
        host = str(parts.hostname)
        if max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, got {max_retries}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        token = (token or os.environ.get(token_variable) or "").strip()
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ValueError(f"the token for {host} (or {token_variable}) has characters that a header cannot contain")
        self.url, self.timeout_s, self.max_retries = url, timeout_s, max_retries
        self.backoff_s, self.max_answer_bytes, self.token_variable = backoff_s, max_answer_bytes, token_variable
        self.name = f"{parts.netloc}{parts.path}".rstrip("/")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        local = _is_loopback(host)
        if token and parts.scheme == "http" and not local:
            warnings.warn(f"the token for {host} is sent over http, unencrypted: use https", stacklevel=3)
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def post(self, path: str, content: Any, *, text: bool = False) -> Any:
        """Send ``content`` as JSON to ``url + path``; return what the JSON of the answer says, or its ``text``.

        Raises:
            RequestError: no answer after all retries, a refusal, an answer that is no JSON, or content that is none.
        """
        try:
            body = json.dumps(content, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RequestError(f"a prompt or column cannot be sent as JSON: {error}") from None
        return self._ask(path, body, text=text)

    def get(self, path: str) -> Any:
        """Return what ``url + path`` answers to GET; raises as :meth:`post` does."""
        return self._ask(path, None)

    def _ask(self, path: str, body: bytes | None, *, text: bool = False) -> Any:
        attempts = self.max_retries + 1
        for attempt in range(attempts):
            try:
                answer = self._send(path, body)
                return answer.decode("utf-8", "replace") if text else _read(answer)
            except _TemporaryError as error:
                if attempt + 1 == attempts:
                    message = f"no answer after {attempts} attempts; the last failed: {error}"
                    raise RequestError(message, error.status, error.said) from None
                time.sleep(min(30.0, self.backoff_s * 2**attempt))
        raise AssertionError("the last attempt returns or raises")

    def _send(self, path: str, body: bytes | None) -> bytes:
        deadline = time.monotonic() + self.timeout_s
        method = "GET" if body is None else "POST"
        request = urllib.request.Request(self.url + path, data=body, headers=self._headers, method=method)
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                body = self._body(response.read1, deadline)
                if response.length:
                    raise _TemporaryError(f"the answer was cut off {response.length} bytes before its end")
                return body
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error)
        except (OSError, HTTPException) as error:  # refused, unknown host, cut off, timed out, not HTTP
            raise _TemporaryError(f"{type(error).__name__}: {error}") from None
        raise AssertionError("an answer is returned or refused")

    def _refuse(self, error: urllib.error.HTTPError) -> None:
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (OSError, HTTPException):  # the status is known, and its text stalls or is cut off
            said = ""
        if error.code >= 500:
            about = f": {said[:300]!r}" if said else ""
            raise _TemporaryError(f"HTTP {error.code} {error.reason}{about}", error.code, said) from None
        if 300 <= error.code < 400:
            to = error.headers.get("Location", "nowhere")
            message = f"HTTP {error.code} points to {to}: redirects are not followed"
            raise RequestError(message, error.code, said) from None
        hint = f" (is {self.token_variable} right?)" if error.code in (401, 403) else ""
        raise RequestError(f"HTTP {error.code} {error.reason}{hint}: {said[:300]!r}", error.code, said) from None

    def _body(self, read1: Callable[[int], bytes], deadline: float) -> bytes:
        body = b""
        while chunk := read1(65536):
            body += chunk
            if len(body) > self.max_answer_bytes:
                raise RequestError(f"the answer is longer than max_answer_bytes={self.max_answer_bytes}")
            if time.monotonic() > deadline:  # the socket's own timeout restarts with each chunk
                raise _TemporaryError(f"the answer took longer than {self.timeout_s} seconds")
        return body


def in_lanes(call: Callable[[Item], Result], items: Sequence[Item], at_once: int) -> list[Result]:
    """Call ``call`` with each item, ``at_once`` of them at a time, each in a thread; return the results in order.

    The first failure is raised at once; the other threads end after the call that they are in.
    """
    lanes, failed = min(at_once, len(items)), threading.Event()

    def call_each(lane: int) -> list[Result]:
        results: list[Result] = []
        for item in items[lane::lanes]:
            if failed.is_set():
                break
            try:
                results.append(call(item))
            except BaseException:
                failed.set()
                raise
        return results

    limit = None if lanes == 1 else math.inf  # a single lane runs in this thread
    shares = [start(partial(call_each, lane), limit) for lane in range(lanes)]
    done, _ = wait(shares, return_when=FIRST_EXCEPTION)
    for share in done:
        share.result()  # raises its error
    results: list[Any] = [None] * len(items)
    for lane, share in enumerate(shares):
        results[lane::lanes] = share.result()
    return results


def _read(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(f"the answer is not JSON: {body[:200]!r}") from None


def _parse_address(url: str, what: str, token_variable: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for an invalid port
    except ValueError as error:
        raise ValueError(f"{what} {url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{what} {url!r}: an address looks like http://127.0.0.1:8000 or https://host/path")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"{what} {parts.hostname!r}: a user name or password in the address would be logged with it; put a token "
            f"into {token_variable}"
        )
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
