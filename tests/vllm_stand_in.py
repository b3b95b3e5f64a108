"""A stand-in for a vLLM server: the same requests and answers (of vLLM 0.32.0), sampled by a tiny model in process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Answer = tuple[int, Any]
Change = Callable[[str, Any, Answer], Answer | None]
"""``change(path, request, answer)`` returns what is answered instead: content that is no text is sent as JSON; None:
the connection is cut."""


class StandIn:
    """What the server does, and what it was asked."""

    def __init__(self, folder: str | Path, **options: Any) -> None:
        """Serve the model in a folder.

        Args:
            options: ``version``, ``runtime_adapters``, ``dev_mode``, ``logprobs_mode``, ``max_model_len``, ``delay_s``
                of each completion, and ``change`` (see :data:`Change`).
        """
        self.folder, self.options = str(folder), options
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.adapters: dict[str, Any] = {}
        self.change: Change = options.get("change", lambda path, request, answer: answer)
        self.seen: list[tuple[str, Any]] = []
        self.busy, self.url = threading.Lock(), ""

    def asked(self, path: str) -> list[Any]:
        """Return the requests to a path, in order."""
        return [request for where, request in self.seen if where == path]

    def answer(self, path: str, request: Any) -> Answer:
        """Answer one request."""
        match path:
            case "/version":
                return 200, {"version": self.options.get("version", "0.32.0")}
            case "/v1/models":
                length = self.options.get("max_model_len", self.model.config.max_position_embeddings)
                base = {"id": self.folder, "root": self.folder, "parent": None, "max_model_len": length}
                return 200, {"data": [base, *({"id": name, "parent": self.folder} for name in self.adapters)]}
            case "/tokenize":
                return 200, {"tokens": self.tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]}
            case "/v1/completions":
                return self.complete(request)
            case "/v1/load_lora_adapter" if self.options.get("runtime_adapters", True):
                return self.load(request["lora_name"], request["lora_path"])
            case "/v1/unload_lora_adapter" if self.options.get("runtime_adapters", True):
                if self.adapters.pop(request["lora_name"], None) is None:
                    return error(404, f"The lora adapter '{request['lora_name']}' cannot be found.")
                return 200, "Success: removed"
            case "/collective_rpc" if self.options.get("dev_mode", True):
                self.model = AutoModelForCausalLM.from_pretrained(request["kwargs"]["weights_path"]).eval()
                return 200, {"results": [None]}
        return 404, {"detail": "Not Found"}

    def load(self, name: str, path: str) -> Answer:
        """Load an adapter on a model of its own."""
        from peft import PeftModel

        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(path).is_dir():
            return error(404, f"Loading lora {name} failed: No adapter found for {path}")
        base = AutoModelForCausalLM.from_pretrained(self.folder)
        self.adapters[name] = PeftModel.from_pretrained(base, path).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    @torch.no_grad()
    def complete(self, request: Any) -> Answer:
        """Sample one response token by token, with a generator of the request's seed."""
        name, given = request["model"], request["prompt"]
        if name != self.folder and name not in self.adapters:
            return error(404, f"The model `{name}` does not exist.")
        model, generator = self.adapters.get(name, self.model), torch.Generator().manual_seed(request["seed"])
        stops, ids, logprobs, reason = request["stop_token_ids"], list[int](), list[float](), "length"
        while len(ids) < request["max_tokens"] and reason == "length":
            logits = model(torch.tensor([[*given, *ids]])).logits[0, -1].float()
            raw = logits.log_softmax(-1)
            if len(ids) < request["min_tokens"]:
                logits[[*stops, self.tokenizer.eos_token_id]] = -torch.inf
            processed = (logits / request["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(processed.exp(), 1, generator=generator))
            ids.append(token)
            shown = raw if self.options.get("logprobs_mode") == "raw_logprobs" else processed
            logprobs.append(float(shown[token]))
            text = self.tokenizer.decode(ids)
            if token in stops or any(stop in text for stop in request["stop"]):
                reason = "stop"
        choice = {"finish_reason": reason, "token_ids": ids, "prompt_token_ids": given}
        return 200, {"model": name, "choices": [{**choice, "logprobs": {"token_logprobs": logprobs}}]}


def error(status: int, message: str) -> Answer:
    """Return an error as vLLM writes it."""
    return status, {"error": {"message": message, "code": status}}


@contextmanager
def standing_in(folder: str | Path, **options: Any) -> Iterator[StandIn]:
    """Serve the model in a folder at ``.url`` during the block; options as for :class:`StandIn`."""
    stand_in = StandIn(folder, **options)

    class Handler(BaseHTTPRequestHandler):
        def reply(self, request: Any) -> None:
            if self.path == "/v1/completions":
                time.sleep(options.get("delay_s", 0))
            with stand_in.busy:  # one after another: the draws of a request must not depend on the others
                stand_in.seen.append((self.path, request))
                answer = stand_in.change(self.path, request, stand_in.answer(self.path, request))
            if answer is None:
                return
            status, content = answer
            body = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, *args: Any) -> None:
            pass  # clients that have gone away

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
