"""A vLLM server, by the stand-in for one: what is asked, how responses end, and every answer that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from vllm_stand_in import error, standing_in

from rlhf_ppo.data.detokenization import TextPieces, before_each
from rlhf_ppo.data.tokenization import left_pad
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.generation.sampling import RowsOf
from rlhf_ppo.generation.stop_strings import StopStringDetector
from rlhf_ppo.generation.vllm.engine import VLLMEngine
from rlhf_ppo.generation.vllm.server import VLLMError, VLLMServer
from rlhf_ppo.generation.vllm.start_line import start_line
from rlhf_ppo.models.actor_critic import ActorCritic

ROWS = [[3, 4, 5], [6, 7], [3, 4, 5], [9]]
STOPS = (0, 8, 16, 24)


@pytest.fixture
def sample(tmp_path: Path, served_model: Path, tokenizer, make_model):
    """Sample responses to ROWS by a stand-in; returns them, the stand-in, and the full pass's log-probs."""

    def run(
        params: dict[str, Any] | None = None,
        rows: list[list[int]] = ROWS,
        whole: RowsOf | None = None,
        retries: int = 0,
        timeout_s: float = 30.0,
        **options: Any,
    ) -> tuple[SampledResponses, Any, torch.Tensor]:
        given = SamplingParams(**{"max_new_tokens": 6, "stop_token_ids": (0,), **(params or {})})
        ids, mask = left_pad(rows, torch.device("cpu"))
        with standing_in(served_model, **options) as stand_in:
            server = VLLMServer(stand_in.url, timeout_s=timeout_s, max_retries=retries, backoff_s=0.0)
            engine = VLLMEngine(server, server.served(), tmp_path / "policy", vocabulary=30, at_once=None)
            model = ActorCritic(make_model("llama"))
            detector = None
            if given.stop_strings:
                pieces = TextPieces(tokenizer)
                before = before_each(pieces, ["x"] * len(rows), ids, mask)
                detector = StopStringDetector(pieces, given.stop_strings, before)
            found = engine(model, ids, mask, given, generator=seeded(), stop_detector=detector, whole=whole)
        with torch.no_grad():
            full = model(ids, mask, found.response_ids, found.mask, banned=found.banned, temperature=given.temperature)
        return found, stand_in, full.logprobs

    return run


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6}, {"temperature": 1.5, "min_new_tokens": 3}])
def test_the_log_probs_are_those_of_the_distribution_that_a_full_pass_gives(sample, params):
    """At another temperature, and with stop tokens banned for a while, the other tokens share all probability."""
    found, _, full = sample({"max_new_tokens": 8, "stop_token_ids": STOPS, **params})
    torch.testing.assert_close(found.logprobs, full, atol=1e-5, rtol=0)
    assert found.values is None and not found.entropy.any()
    assert found.finished.any() and not found.finished.all()  # ends of both kinds were seen
    lengths = found.mask.sum(dim=1)
    assert (lengths >= params.get("min_new_tokens", 1)).all()
    ended = [int(ids[n - 1]) in STOPS for ids, n in zip(found.response_ids, lengths, strict=True)]
    assert ended == found.finished.tolist()


def test_a_request_leaves_nothing_that_changes_the_distribution_to_the_server(sample, served_model):
    _, stand_in, _ = sample({"temperature": 0.7})
    asked = stand_in.asked("/v1/completions")
    assert sorted(request["prompt"] for request in asked) == sorted(ROWS)  # ids, without padding
    neutral = {"n": 1, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True, "temperature": 0.7}
    for request in asked:
        assert {name: request[name] for name in neutral} == neutral
        assert request["model"] == str(served_model) and request["max_tokens"] == 6 and request["stop_token_ids"] == [0]
    assert len({request["seed"] for request in asked}) == 4  # equal prompts are answered apart


def test_a_rows_draws_do_not_depend_on_how_a_rollout_is_divided(sample):
    whole, _, _ = sample()
    part, _, _ = sample(rows=ROWS[2:], whole=RowsOf([2, 3], 4))
    length = part.mask.shape[1]
    assert torch.equal(part.response_ids, whole.response_ids[2:, :length])
    again, _, _ = sample()
    assert torch.equal(again.response_ids, whole.response_ids)


def test_stop_strings_end_a_response_where_our_decoding_finds_them(sample, tokenizer):
    free, _, _ = sample({"max_new_tokens": 12, "stop_token_ids": ()})
    text = tokenizer.decode(free.response_ids[0])
    found, stand_in, _ = sample({"max_new_tokens": 12, "stop_token_ids": (), "stop_strings": (text[3:5],)})
    assert tokenizer.decode(found.response_ids[0][found.mask[0]]) == text[:5] and found.finished[0]
    assert all(request["stop"] == [text[3:5]] for request in stand_in.asked("/v1/completions"))


def test_where_a_server_stops_for_another_reason_it_goes_on(sample, served_model):
    """It calls one token a stop that is none of ours: the rest is asked for until our length, with what was sampled."""

    def stops_early(path: str, request: Any, answer: Any) -> Any:
        if path == "/v1/completions":
            choice = answer[1]["choices"][0]
            choice["token_ids"], choice["finish_reason"] = choice["token_ids"][:4], "stop"
            choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:4]
        return answer

    found, stand_in, full = sample({"max_new_tokens": 6, "stop_token_ids": ()}, change=stops_early)
    assert found.mask.sum(dim=1).tolist() == [6] * 4 and not found.finished.any()
    torch.testing.assert_close(found.logprobs, full, atol=1e-5, rtol=0)
    rest = [request for request in stand_in.asked("/v1/completions") if request["max_tokens"] == 2]
    assert sorted(len(request["prompt"]) - 4 for request in rest) == sorted(map(len, ROWS))


# Answers that are refused


def completion(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Change the JSON of each completion in place."""

    def changed(path: str, request: Any, answer: Any) -> Any:
        if path == "/v1/completions" and answer[0] == 200:
            change(answer[1])
        return answer

    return {"change": changed}


def instead(status: int, content: Any) -> dict[str, Any]:
    return {"change": lambda path, request, answer: (status, content) if path == "/v1/completions" else answer}


def choice(**fields: Any) -> dict[str, Any]:
    return completion(lambda answer: answer["choices"][0].update(fields))


def first(name: str, value: Any) -> dict[str, Any]:
    """Replace the first token id or log-prob."""

    def change(answer: dict[str, Any]) -> None:
        found = answer["choices"][0]
        (found["token_ids"] if name == "id" else found["logprobs"]["token_logprobs"])[0] = value

    return completion(change)


def without_last(reason: str) -> dict[str, Any]:
    def change(answer: dict[str, Any]) -> None:
        found = answer["choices"][0]
        found["token_ids"].pop()
        found["logprobs"]["token_logprobs"].pop()
        found["finish_reason"] = reason

    return completion(change)


def failing(status: int, message: str) -> dict[str, Any]:
    return instead(status, error(status, message)[1])


def cut(path: str, request: Any, answer: Any) -> Any:
    return None if path == "/v1/completions" else answer


REFUSED = {
    "slow": ({"delay_s": 0.3, "timeout_s": 0.05}, "no answer after 2 attempts; .*(timed out|longer than)"),
    "gone in the middle": ({"change": cut}, "start the server again"),
    "bad JSON": (instead(200, '{"choices": [{"tok'), "not JSON"),
    "no completion": (instead(200, {"text": "hello"}), "which is no completion"),
    "out of memory": (failing(500, "CUDA out of memory. Tried to"), "ran out of memory.*--max-num-seqs"),
    "engine lost": (failing(500, "EngineCore encountered an issue."), "has lost its engine.*Start it again"),
    "model gone": (failing(404, "The model `x` does not exist."), r"not have the model or adapter .*\(any more\)"),
    "another adapter": (completion(lambda answer: answer.update(model="x")), "answers for 'x' where .* was asked"),
    "too old": ({**choice(token_ids=None), "version": "0.8.4"}, r"version 0\.8\.4.*too old, update vLLM"),
    "too few ids": (without_last("length"), "returns 5 tokens by 'length' where 6 were asked"),
    "no ids": (choice(token_ids=[], logprobs={"token_logprobs": []}), "returns 0 tokens by 'length'"),
    "text for ids": (choice(token_ids=["a"] * 6), r"returns \['a', .* for token ids"),
    "too few log-probs": (choice(logprobs={"token_logprobs": [-1.0]}), "returns 1 log-probs for 6 tokens"),
    "outside the vocabulary": (first("id", 30), "token id 30, which is not in the model's vocabulary of 30"),
    "NaN": (first("logprob", float("nan")), "returns nan as the log-prob"),
    "impossible": (first("logprob", -9999.0), r"returns -9999\.0 as the log-prob"),
    "positive": (first("logprob", 0.5), r"returns 0\.5 as the log-prob"),
    "no number": (first("logprob", None), "returns None as the log-prob"),
    "aborted": (choice(finish_reason="abort"), "ended a response by 'abort'"),
    "another prompt": (choice(prompt_token_ids=[1]), "has read other ids than the prompt's"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_fault_ends_sampling_in_one_sentence_that_names_the_server(sample, fault):
    options, message = REFUSED[fault]
    with pytest.raises(VLLMError, match=message) as raised:
        sample({"stop_token_ids": ()}, rows=ROWS[:2], retries=1, **options)
    assert str(raised.value).startswith("vLLM server 127.0.0.1:") and "\n" not in str(raised.value)


def test_retries_are_bounded_and_a_passing_fault_costs_nothing(sample):
    failures = iter([True, True, False] * 4)

    def sometimes(path: str, request: Any, answer: Any) -> Any:
        return error(503, "busy") if "compl" in path and next(failures, False) else answer

    found, _, _ = sample(retries=2, rows=ROWS[:1], change=sometimes)
    calm, _, _ = sample(rows=ROWS[:1])
    assert torch.equal(found.response_ids, calm.response_ids)
    with pytest.raises(VLLMError, match="no answer after 3 attempts"):
        sample(retries=2, rows=ROWS[:1], **instead(503, error(503, "busy")[1]))


def test_a_server_that_is_none_is_named(served_model):
    for options, message in (
        ({"change": lambda *_: (200, {"hello": 1})}, "no vLLM server, or one too old"),
        ({"change": lambda *_: (404, "Not Found")}, "failed when asked: HTTP 404"),
        ({"change": lambda path, request, answer: (200, []) if "models" in path else answer}, "no vLLM server"),
    ):
        with standing_in(served_model, **options) as stand_in, pytest.raises(VLLMError, match=message):
            VLLMServer(stand_in.url, timeout_s=5, max_retries=0).served()
    with pytest.raises(VLLMError, match=r"Connection refused.*start the server again, or correct vllm_url"):
        VLLMServer("http://127.0.0.1:9", timeout_s=5, max_retries=0).served()
    with pytest.raises(ValueError, match="vLLM server 'localhost:8000': an address looks like"):
        VLLMServer("localhost:8000", timeout_s=5, max_retries=0)


def test_an_adapter_that_the_server_does_not_load_is_explained(served_model, tmp_path):
    def refuses(path: str, request: Any, answer: Any) -> Any:
        return error(500, "LoRA rank 64 is greater than max_lora_rank 16.") if "load" in path else answer

    for options, message in (
        ({"runtime_adapters": False}, "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"),
        ({"change": refuses}, "LoRA rank 64 is greater"),
    ):
        with standing_in(served_model, **options) as stand_in, pytest.raises(VLLMError, match=message):
            VLLMServer(stand_in.url, timeout_s=5, max_retries=0).load_adapter("a", tmp_path / "none")


def test_adapters_from_a_folder_that_the_server_does_not_see_and_names_that_it_has(served_model, tmp_path, make_model):
    from peft import LoraConfig, get_peft_model

    get_peft_model(make_model("llama"), LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with standing_in(served_model) as stand_in:
        server = VLLMServer(stand_in.url, timeout_s=5, max_retries=0)
        with pytest.raises(VLLMError, match="put output_dir on a file system that its machine has under the same path"):
            server.load_adapter("a", tmp_path / "elsewhere")
        server.load_adapter("a", tmp_path / "adapter")
        server.load_adapter("a", tmp_path / "adapter")  # a retry whose first attempt had arrived
        server.unload_adapter("a")
        server.unload_adapter("a")
        assert json.dumps(list(stand_in.adapters)) == "[]"
    message = "VLLM_SERVER_DEV_MODE=1, or train an adapter"
    with standing_in(served_model, dev_mode=False) as stand_in, pytest.raises(VLLMError, match=message):
        VLLMServer(stand_in.url, timeout_s=5, max_retries=0).reload_weights(served_model)


def test_the_line_that_starts_a_server():
    line = start_line("my models/gpt2", lora_rank=12, bf16=True)
    assert line.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve 'my models/gpt2' --host 127.0.0.1 ")
    for flag in ("--dtype bfloat16", "--enable-lora --max-lora-rank 16", "--generation-config vllm"):
        assert flag in line
    assert "--logprobs-mode processed_logprobs" in line
    line = start_line("gpt2", lora_rank=None, bf16=False)
    assert line.startswith("VLLM_SERVER_DEV_MODE=1 vllm serve gpt2 ")
    assert "--dtype float32" in line and "lora" not in line
