"""Serve a reward over HTTP: a function or a reward model in a process, or on a machine, of its own.

What you will see: the address to train with, then one line per request, until Ctrl-C. It starts at once; a reward model
takes as long as it takes to load.
Run:   python examples/reward_server.py --reward rlhf_ppo.toy_rewards:dialogue
Then:  rlhf-ppo train --reward http://127.0.0.1:8000 ...
With a token in RLHF_PPO_REWARD_TOKEN, here and where you train, nobody else is answered. It listens on this machine
alone unless --host says otherwise; beyond it, put a proxy that speaks https in front: tokens and texts are readable.

Request: POST {"items": [{"id", "prompt", "completion", "columns"}]}; answer: {"scores": [{"id", "score"}]}.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlhf_ppo.rewards import RewardError, load_reward, reward_name, score

Score = Callable[[list[Any], list[Any], dict[str, list[Any]]], list[float | None]]


class BadRequestError(ValueError):
    """The request is not what the protocol says."""


def read_items(body: bytes) -> list[dict[str, Any]]:
    """The items of a request; JSON is the only thing that is ever read from it."""
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


def answer(items: list[dict[str, Any]], score_all: Score) -> dict[str, Any]:
    """The scores of a request's items."""
    names = items[0].get("columns", {})
    columns = {name: [item["columns"][name] for item in items] for name in names}
    scores = score_all([item["prompt"] for item in items], [item["completion"] for item in items], columns)
    return {"scores": [{"id": item["id"], "score": s} for item, s in zip(items, scores, strict=True)]}


def make_server(
    reward: Any, *, host: str = "127.0.0.1", port: int = 8000, token: str | None = None, max_bytes: int = 8 * 2**20
) -> ThreadingHTTPServer:
    """A server for a reward function; ``port`` 0 takes a free one. Call ``serve_forever()`` on it."""
    lock = threading.Lock()  # models and user code are not made for several threads at once

    def score_all(prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]) -> list[float | None]:
        with lock:
            return score(reward, prompts, completions, columns, needs_scores=False)

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # seconds that a silent client may hold a thread

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal():
                return self._reply(411, {"error": "Content-Length is missing"})
            if len(length) > 12 or int(length) > max_bytes:
                return self._reply(413, {"error": f"the body is longer than {max_bytes} bytes"})
            body = self.rfile.read(int(length))
            given = self.headers.get("Authorization", "")
            # compare_digest takes the same time wherever the difference is, so nothing can be guessed from it.
            if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return self._reply(401, {"error": "wrong or missing token"})
            try:
                return self._reply(200, answer(read_items(body), score_all))
            except BadRequestError as error:
                return self._reply(400, {"error": str(error)})
            except RewardError as error:
                print(f"error: {error}", flush=True)
                return self._reply(500, {"error": "the reward function failed; the server's output says why"})

        def _reply(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content, allow_nan=False).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")  # what was not read of a refused body must not become a request
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

    return ThreadingHTTPServer((host, port), Handler)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reward", required=True, help="file.py:function, module:function, or a model's folder or hub id"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for every network")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu", help="where a reward model runs")
    flags = parser.parse_args(argv)

    reward = load_reward(flags.reward, device=flags.device)
    token = os.environ.get("RLHF_PPO_REWARD_TOKEN", "").strip() or None
    server = make_server(reward, host=flags.host, port=flags.port, token=token)
    host, port = server.server_address[:2]
    asks = "with" if token else "without"
    print(f"{reward_name(reward)} at http://{host}:{port} ({asks} a token)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
