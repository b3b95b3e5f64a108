"""The vLLM server: the requests that a run makes, and checks of the answers; as in the source of vLLM 0.32.0."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.runtime.http_json import JSONClient, RequestError

TOKEN_VARIABLE = "RLHF_PPO_VLLM_TOKEN"
"""Environment variable with the server's key (vLLM's ``--api-key``)."""

WRITTEN_FOR = "0.32.0"
"""The version of vLLM whose source and answers this was written for."""

_ROUNDING = 1e-3
"""Nats by which rounding may lift a log-prob above 0."""


class VLLMError(RunError):
    """The vLLM server failed, or samples from another distribution than the policy's."""


class Served(NamedTuple):
    """The model that a server serves."""

    name: str
    """By which requests call it."""
    version: str
    """vLLM's."""
    max_model_len: int | None
    """Most tokens of prompt and response; None: the server does not say."""


class Ask(NamedTuple):
    """A request for one response, or for the rest of one."""

    policy: str
    """Name of the model or adapter that samples."""
    salt: str
    """What the server has cached of a prompt serves requests of the same salt alone."""
    ids: list[int]
    """What is to be continued."""
    seed: int
    max_tokens: int
    min_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]

    def body(self) -> dict[str, Any]:
        """Return the request, in which everything that changes the distribution is spelled out."""
        return {
            "model": self.policy,
            "prompt": self.ids,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            # The server's defaults may come from a model's generation config: none of these is left to it.
            "n": 1,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,  # what ends a response is ours to say
            "stop_token_ids": list(self.stop_token_ids),
            "stop": list(self.stop_strings),
            "logprobs": 0,
            "return_token_ids": True,
            "cache_salt": self.salt,
        }


class Answer(NamedTuple):
    """What the server sampled."""

    ids: list[int]
    logprobs: list[float]
    """One per id."""
    stopped: bool
    """By one of the stops that it was given, not at the length limit."""


class VLLMServer:
    """A vLLM server, by its HTTP interface."""

    def __init__(self, url: str, *, timeout_s: float, max_retries: int, backoff_s: float = 0.5) -> None:
        """Check the address; ask nothing yet.

        Args:
            url: its address.
            timeout_s, max_retries, backoff_s: see :class:`rlhf_ppo.runtime.http_json.JSONClient`.
        Raises:
            ValueError: an invalid address or token.
        """
        self._client = JSONClient(
            url.rstrip("/"),
            what="vLLM server",
            token_variable=TOKEN_VARIABLE,
            timeout_s=timeout_s,
            max_retries=max_retries,
            backoff_s=backoff_s,
        )
        self.name = self._client.name
        self.version = "unknown"

    def served(self) -> Served:
        """Ask for the server's version and model."""
        try:
            version = self._client.get("/version")
            models = self._client.get("/v1/models")
        except RequestError as error:
            raise self._failed("", error) from None
        try:
            self.version = str(version["version"])
            base = next(model for model in models["data"] if not model.get("parent"))
            room = base.get("max_model_len")
            return Served(str(base["id"]), self.version, None if room is None else int(room))
        except (KeyError, TypeError, ValueError, StopIteration):
            raise self._error(
                f"answers /version with {version!r:.100} and /v1/models with {models!r:.100}: it is no vLLM server, or "
                f"one too old (this was written for {WRITTEN_FOR})"
            ) from None

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text by the server's tokenizer, without special tokens around it."""
        try:
            answer = self._client.post("/tokenize", {"prompt": text, "add_special_tokens": False})
            return [int(i) for i in answer["tokens"]]
        except RequestError as error:
            raise self._failed(" a text to tokenize", error) from None
        except (KeyError, TypeError, ValueError):
            raise self._error(f"answers /tokenize without token ids: {answer!r:.200}") from None

    def complete(self, ask: Ask, vocabulary: int) -> Answer:
        """Have one response sampled, and check the answer; ``vocabulary``: size of ours."""
        try:
            answer = self._client.post("/v1/completions", ask.body())
        except RequestError as error:
            raise self._failed(" a prompt", error, adapter=ask.policy) from None
        try:
            (choice,) = answer["choices"]
            model, reason, ids = answer["model"], choice["finish_reason"], choice.get("token_ids")
            read, logprobs = choice.get("prompt_token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._error(f"answers a prompt with {answer!r:.200}, which is no completion") from None
        if ids is None or logprobs is None or read is None:
            raise self._error(
                f"returns no token ids or log-probs (version {self.version}): that version is too old, update vLLM "
                f"(this was written for {WRITTEN_FOR})"
            )
        if model != ask.policy:
            raise self._error(f"answers for {model!r} where {ask.policy!r} was asked: it has another adapter or model")
        if read != ask.ids:
            raise self._error(
                f"has read other ids than the prompt's {len(ask.ids)}: it was given {_start(ask.ids)}, "
                f"and read {_start(read)}"
            )
        if problem := _problem(ids, logprobs, reason, ask, vocabulary):
            raise self._error(problem)
        return Answer(ids, [min(0.0, float(x)) for x in logprobs], reason == "stop")

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a LoRA adapter from a folder that the server can read, under a name that it does not have yet."""
        try:
            self._client.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, text=True)
        except RequestError as error:
            if "already been loaded" in error.said:  # by the attempt whose answer was lost: the name says what is in it
                return
            if error.status in (404, 405) and "No adapter found" not in error.said:
                raise self._error(
                    "loads no adapters while it runs: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and "
                    "--enable-lora"
                ) from None
            if "No adapter found" in error.said:
                raise self._error(
                    f"cannot read the adapter in {folder}: put output_dir on a file system that its machine has under "
                    "the same path"
                ) from None
            raise self._failed(f" to load the adapter in {folder}", error) from None

    def unload_adapter(self, name: str, *, patient: bool = True) -> None:
        """Unload an adapter; one that is not there any more is no error. Not ``patient``: try once, for 10 seconds."""
        client = self._client
        if not patient:
            client = copy.copy(client)
            client.timeout_s, client.max_retries = min(10.0, client.timeout_s), 0
        try:
            client.post("/v1/unload_lora_adapter", {"lora_name": name}, text=True)
        except RequestError as error:
            if error.status != 404:
                raise self._failed(f" to unload the adapter {name!r}", error) from None

    def reload_weights(self, folder: Path) -> None:
        """Replace all weights by those in a folder that the server can read (``reload_weights`` of its workers)."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            self._client.post("/collective_rpc", call, text=True)
        except RequestError as error:
            if error.status in (404, 405):
                raise self._error(
                    "has no request that replaces its weights: start it with VLLM_SERVER_DEV_MODE=1, or train an "
                    "adapter (peft_config, --lora-rank), which it loads without"
                ) from None
            raise self._failed(f" to read the weights in {folder}", error) from None

    def _failed(self, asked: str, error: RequestError, adapter: str | None = None) -> VLLMError:
        """Say why a request failed for good, and what to do."""
        said = _message(error.said)
        if "out of memory" in said.lower() or "outofmemory" in said.lower():
            remedy = "start it with a lower --max-num-seqs or --max-model-len, or lower decode_batch_size"
            return self._error(f"ran out of memory when asked{asked}: {said!r:.200}; {remedy}")
        if "EngineCore" in said or "EngineDead" in said:
            return self._error(f"has lost its engine: {said!r:.200}; its log says why. Start it again")
        if adapter is not None and error.status == 404:
            return self._error(f"does not have the model or adapter {adapter!r} (any more): {said!r:.200}")
        again = "start the server again, or correct vllm_url" if error.status is None else "its log may say why"
        return self._error(f"failed when asked{asked}: {error}; {again}")

    def _error(self, message: str) -> VLLMError:
        return VLLMError(f"vLLM server {self.name} {message}")


def _problem(ids: Any, logprobs: Any, reason: Any, ask: Ask, vocabulary: int) -> str | None:
    """Return what is wrong with sampled ids and their log-probs; None: nothing."""
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        return f"returns {_start(ids)} for token ids"
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        return f"returns {len(logprobs) if isinstance(logprobs, list) else 'no'} log-probs for {len(ids)} tokens"
    if outside := [i for i in ids if not 0 <= i < vocabulary]:
        where = f"the model's vocabulary of {vocabulary}"
        return f"sampled token id {outside[0]}, which is not in {where}: it serves another model"
    for i, x in zip(ids, logprobs, strict=True):
        # vLLM writes -9999 for minus infinity.
        if not isinstance(x, (int, float)) or not math.isfinite(x) or not -9999 < x <= _ROUNDING:
            return f"returns {x!r} as the log-prob of the token {i} that it sampled"
    if reason not in ("stop", "length"):
        return f"ended a response by {reason!r}, neither at a stop nor at the length limit"
    if len(ids) > ask.max_tokens or not ids or (reason == "length" and len(ids) < ask.max_tokens):
        return f"returns {len(ids)} tokens by {reason!r} where {ask.max_tokens} were asked"
    return None


def _message(said: str) -> str:
    """Return the message of an error that vLLM answered, or the answer's text."""
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return said


def _start(ids: Any) -> str:
    return f"{ids!r:.80}"
