"""HTTP server: serve a reward function to clients that may be slow, faulty or hostile."""

from __future__ import annotations

import hmac
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlhf_ppo.rewards.functions import RewardFunction
from rlhf_ppo.rewards.logs import RewardLog
from rlhf_ppo.rewards.scoring import score
from rlhf_ppo.rewards.validation import RewardError

Score = Callable[[list[Any], list[Any], dict[str, list[Any]]], list[float | None]]


class BadRequestError(ValueError):
    """A request that breaks the protocol."""


def read_items(body: bytes) -> list[dict[str, Any]]:
    """Parse the items of a request, which is read as JSON and nothing else.

    Raises:
        BadRequestError: says what was expected, and repeats nothing of the request.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequestError("the body is not JSON") from None
    items = request.get("items") if isinstance(request, dict) else None
    if not isinstance(items, list) or not items:
        raise BadRequestError('expected {"items": [...]} with at least one item')
    for item in items:
        known = isinstance(item, dict) and {"id", "prompt", "completion"} <= set(item)
        if not known or not isinstance(item["id"], str) or not isinstance(item.get("columns", {}), dict):
            raise BadRequestError('an item is {"id": text, "prompt", "completion", "columns": {...}}')
    if len({item["id"] for item in items}) < len(items):
        raise BadRequestError("two items have the same id")
    if len({frozenset(item.get("columns", {})) for item in items}) > 1:
        raise BadRequestError("the items have different columns")
    return items


def answer(items: list[dict[str, Any]], score_all: Score, log: RewardLog | None = None) -> dict[str, Any]:
    """Score a request's items; what the reward has logged meanwhile (``log``) goes with the scores."""
    names = items[0].get("columns", {})
    columns = {name: [item["columns"][name] for item in items] for name in names}
    scores = score_all([item["prompt"] for item in items], [item["completion"] for item in items], columns)
    rows = [{"id": item["id"], "score": s} for item, s in zip(items, scores, strict=True)]
    logged = {} if log is None else log.columns(len(items))
    for i, row in enumerate(rows if logged else ()):
        row["extra"] = {column: values[i] for column, values in logged.items()}
    return {"scores": rows, **({"metrics": log.metrics()} if log is not None and log.metrics() else {})}


class _UntilDeadline(io.RawIOBase):
    """Read from a socket until a deadline: its own timeout would restart with each byte."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._deadline = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class RewardServer(ThreadingHTTPServer):
    """Answer ``POST {"items": [{"id", "prompt", "completion", "columns"}]}`` with ``{"scores": [{"id", "score"}]}``.

    What the reward logs goes with it: ``"metrics": {name: number}`` by ``log_metric``, and in each score's ``"extra"``
    its values of the columns by ``log_extra``.

    Each connection has its own thread and carries one request. The reward is called by one thread at a time, because
    models and user code are rarely thread-safe. Call ``serve_forever()``.
    """

    daemon_threads = True
    request_queue_size = 1024  # backlog of connections; 5 by default

    def __init__(
        self,
        reward: RewardFunction,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        max_bytes: int = 8 * 2**20,
        request_s: float = 30.0,
        max_connections: int = 2048,
    ) -> None:
        """Bind and listen; requests are answered once ``serve_forever()`` runs.

        Args:
            reward: the reward function.
            host: address to listen on; by default only this machine can connect.
            port: 0 picks a free one.
            token: clients must send it as ``Authorization: Bearer``; None: no authentication.
            max_bytes: longer requests are refused unread.
            request_s: time limit in seconds to receive a request, and again to send its answer.
            max_connections: further connections get a 503.
        """
        self.reward, self.token, self.max_bytes, self.request_s = reward, token, max_bytes, request_s
        self._asking = threading.Lock()
        self._free = threading.Semaphore(max_connections)
        super().__init__((host, port), _Handler)

    def score(
        self, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]], log: RewardLog | None = None
    ) -> list[float | None]:
        """Call the reward, one thread at a time; ``log`` takes what it logs."""
        with self._asking:
            return score(self.reward, prompts, completions, columns, needs_scores=False, log=log)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse it with a 503."""
        if not self._free.acquire(blocking=False):
            request.setblocking(False)  # waiting for this client would block all others
            request.send(b"HTTP/1.0 503 Too many connections\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system is out of threads
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "reward", ""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_UntilDeadline(self.connection, self.server.request_s))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        given, token = self.headers.get("Authorization", ""), self.server.token
        # compare_digest takes constant time, so that timing reveals nothing about the token.
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return self._refuse(401, "wrong or missing token")
        if self.headers.get_content_type() != "application/json":
            # A web page cannot send this type to another origin without a preflight request.
            return self._refuse(415, "Content-Type must be application/json")
        if not (length.isascii() and length.isdecimal()):
            return self._refuse(411, "Content-Length is missing")
        if len(length) > 12 or int(length) > self.server.max_bytes:
            return self._refuse(413, f"the body is longer than {self.server.max_bytes} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return self._reply(400, {"error": "the body is shorter than Content-Length says"})
        try:
            log = RewardLog()
            return self._reply(200, answer(read_items(body), partial(self.server.score, log=log), log))
        except BadRequestError as error:
            return self._reply(400, {"error": str(error)})
        except RewardError as error:
            print(f"error: {error}", flush=True)
            return self._reply(500, {"error": "the reward function failed; the server's output says why"})

    def _refuse(self, status: int, why: str) -> None:
        """Answer without reading the body, then drain some of it, so that a client still sending gets the answer."""
        self._reply(status, {"error": why})
        self.connection.shutdown(socket.SHUT_WR)
        left = self.server.max_bytes
        while left > 0 and (piece := self.rfile.read1(65536)):
            left -= len(piece)

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content, allow_nan=False).encode()
        self.connection.settimeout(self.server.request_s)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True
