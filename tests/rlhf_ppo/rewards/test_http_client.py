"""HTTP rewards: everything that a server can get wrong, and what the client makes of it."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf_ppo import HTTPReward, StepRewards
from rlhf_ppo.rewards.http_client import TOKEN_VARIABLE
from rlhf_ppo.rewards.scoring import score
from rlhf_ppo.rewards.validation import RewardError


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@contextmanager
def running(server: ThreadingHTTPServer):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


Answer = tuple[int, bytes, dict[str, str]]


@contextmanager
def answering(answers: Callable[[int, list[dict[str, Any]]], Answer]):
    """A server that answers request ``n`` (from 0) as told; yields its address and the requests it saw."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"headers": dict(self.headers), "items": body["items"], "path": self.path})
            status, content, headers = answers(len(seen) - 1, body["items"])
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, seen


def scores(rows: Any, status: int = 200) -> Answer:
    return status, json.dumps({"scores": rows}).encode(), {}


def lengths(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": item["id"], "score": float(len(item["completion"]))} for item in items]


def asks(url: str, completions: tuple[str, ...] = ("a", "bb", "ccc"), **options: Any) -> list[Any]:
    reward = HTTPReward(url, **{"backoff_s": 0.0, "timeout_s": 10.0, **options})
    return reward(["p"] * len(completions), list(completions))


# Servers that misbehave: row 15


def test_fault_15_shuffled_items_go_back_to_their_completions():
    with answering(lambda n, items: scores(list(reversed(lengths(items))))) as (url, seen):
        assert asks(url, ("a", "bb", "ccc", "dddd"), batch_size=3) == [1.0, 2.0, 3.0, 4.0]
    # Requests run side by side, so either may be seen first.
    large, small = sorted((request["items"] for request in seen), key=len, reverse=True)
    assert (len(large), len(small)) == (3, 1)
    assert large[0] == {"id": "0", "prompt": "p", "completion": "a", "columns": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"missing ids: \['2'\]"),
        (lambda rows: [*rows, {"id": "9", "score": 1.0}], r"unknown ids: \['9'\]"),
        (lambda rows: [*rows, rows[1]], r"duplicate ids: \['1'\]"),
        (lambda rows: [rows[0], rows[0], rows[2]], r"missing ids: \['1'\]"),
        (lambda rows: [{**rows[0], "id": 0}, *rows[1:]], r"missing ids: \['0'\]"),
        (lambda rows: [{**rows[0], "id": ["0"]}, *rows[1:]], "missing ids"),
        (lambda rows: [{"id": "0"}, *rows[1:]], "expected .*scores"),
        (lambda rows: {"0": 1.0}, "expected .*scores"),
        (lambda rows: [1.0, 2.0, 3.0], "expected .*scores"),
    ],
)
def test_fault_15_ids_are_verified(change, message):
    with answering(lambda n, items: scores(change(lengths(items)))) as (url, seen):
        with pytest.raises(RewardError, match=message) as error:
            asks(url)
        assert "127.0.0.1" in str(error.value) and len(seen) == 1


@pytest.mark.parametrize("value", ['"1.0"', "[1.0, 2.0]", "true and", '{"steps": [[9, 1.0]]}', "NaN", "1e999"])
def test_fault_15_an_invalid_score_is_refused_as_from_any_reward(value):
    def answers(n, items):
        return 200, f'{{"scores": [{{"id": "0", "score": {value}}}]}}'.encode(), {}

    with answering(answers) as (url, _), pytest.raises(RewardError):
        score(HTTPReward(url, backoff_s=0.0), ["p"], ["abc"], {}, completion_ids=[[1, 2, 3]], decode=lambda ids: "abc")


@pytest.mark.parametrize("status", [500, 503])
def test_fault_15_a_server_error_is_retried(status):
    with answering(lambda n, items: scores(lengths(items), status if n < 2 else 200)) as (url, seen):
        assert asks(url, max_retries=2) == [1.0, 2.0, 3.0]
        assert len(seen) == 3


def test_fault_15_retries_are_bounded_and_back_off(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("rlhf_ppo.runtime.http_json.time.sleep", pauses.append)
    with answering(lambda n, items: scores([], 502)) as (url, seen):
        with pytest.raises(RewardError, match=r"no answer after 4 attempts; the last failed: HTTP 502"):
            asks(url, backoff_s=0.5)
        assert len(seen) == 4 and pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("status", [400, 404, 422, 429])
def test_fault_15_a_refusal_is_not_retried(status):
    with answering(lambda n, items: (status, b"what is this", {})) as (url, seen):
        with pytest.raises(RewardError, match=f"HTTP {status}.*what is this"):
            asks(url)
        assert len(seen) == 1


def test_fault_15_bad_json_is_not_retried_and_shown():
    with answering(lambda n, items: (200, b"<html>oops", {})) as (url, seen):
        with pytest.raises(RewardError, match="not JSON: b'<html>oops'"):
            asks(url)
        assert len(seen) == 1


def test_fault_15_servers_that_are_down_or_hang_are_retried_and_named():
    with answering(lambda n, items: scores(lengths(items))) as (url, _):
        pass
    with pytest.raises(RewardError, match=r"no answer after 2 attempts.*refused"):
        asks(url, max_retries=1)
    release = threading.Event()

    def hangs_once(n, items):
        if n == 0:
            release.wait(20)
        return scores(lengths(items))

    with answering(hangs_once) as (url, _):
        assert asks(url, timeout_s=0.2) == [1.0, 2.0, 3.0]
        release.set()


def test_fault_15_a_slow_or_cut_off_answer_ends_in_time():
    class Drip(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            if self.path == "/cut":
                self.wfile.write(b'{"scores": [')
                return
            try:
                for _ in range(1000):
                    self.wfile.write(b" ")
                    time.sleep(0.02)
            except OSError:
                pass

        def log_message(self, *args: Any) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Drip)) as url:
        with pytest.raises(RewardError, match=r"took longer than 0\.1 seconds"):
            asks(url, timeout_s=0.1, max_retries=0)
        with pytest.raises(RewardError, match="cut off 988 bytes before its end"):
            asks(f"{url}/cut", max_retries=0)


def test_fault_15_an_endless_answer_is_refused():
    with (
        answering(lambda n, items: (200, b" " * 100_000, {})) as (url, _),
        pytest.raises(RewardError, match="longer than max_answer_bytes=1000"),
    ):
        asks(url, max_answer_bytes=1000)


def test_a_redirect_is_not_followed_so_the_token_stays():
    with answering(lambda n, items: scores(lengths(items))) as (elsewhere, heard):
        for status in (301, 302, 303, 307, 308):
            with answering(lambda n, items, s=status: (s, b"", {"Location": elsewhere})) as (url, seen):
                with pytest.raises(RewardError, match=f"HTTP {status} points to {elsewhere}: redirects are not"):
                    asks(url, token="secret")
                assert seen[0]["headers"]["Authorization"] == "Bearer secret"
        assert not heard


def test_fault_15_a_failed_server_ends_a_run_with_model_and_checkpoint_and_the_run_resumes(make_trainer):
    """The second rollout finds the server down. Resumed, the run ends as though nothing had happened."""
    state = {"down": False}

    def answers(n, items):
        if state["down"] and n == 2:  # after the question at the start and the first rollout
            return scores([], 503)
        return scores(lengths(items))

    with answering(lambda n, items: scores(lengths(items))) as (url, _):
        whole = make_trainer(reward_funcs=HTTPReward(url), total_episodes=24)
        whole.train()
    state["down"] = True
    with answering(answers) as (url, _):
        cut = make_trainer(reward_funcs=HTTPReward(url, max_retries=0), total_episodes=24)
        with pytest.raises(RewardError, match=r"503.*failed_rollout\.jsonl.*resume_from_checkpoint=.*checkpoint-1"):
            cut.train()
        assert (cut.run.path / "model.safetensors").is_file()
        resumed = make_trainer(reward_funcs=HTTPReward(url), total_episodes=24, output_dir=str(cut.run.path))
        resumed.train(resume_from_checkpoint=cut.run.path / "checkpoint-1")

    def numbers(trainer):  # the parts are named after the servers' ports
        return [{k: v for k, v in row.items() if "/part/" not in k} for row in trainer.run.read()]

    assert numbers(resumed) == numbers(whole)


# What the client takes and gives


def test_requests_run_concurrently_up_to_the_limit_and_keep_their_order():
    """Seven requests of one completion; each waits until three are there, which four at a time would never need."""
    lock, here, most = threading.Lock(), 0, 0
    three = threading.Barrier(3)

    def answers(n, items):
        nonlocal here, most
        with lock:
            here += 1
            most = max(most, here)
        if int(items[0]["id"]) < 6:
            three.wait(timeout=10)
        with lock:
            here -= 1
        return scores(lengths(items))

    with answering(answers) as (url, seen):
        completions = tuple("x" * n for n in range(1, 8))
        assert asks(url, completions, batch_size=1, concurrency=3) == [1, 2, 3, 4, 5, 6, 7]
        assert len(seen) == 7 and most == 3


def test_a_failed_request_stops_all_lanes():
    with answering(lambda n, items: (400, b"no", {})) as (url, seen):
        with pytest.raises(RewardError, match="HTTP 400"):
            asks(url, ("x",) * 50, batch_size=1, concurrency=2)
        assert len(seen) <= 4


def test_steps_over_http(make_trainer):
    with answering(lambda n, items: scores([{"id": i["id"], "score": {"steps": [[1, 0.5]]}} for i in items])) as (
        url,
        _,
    ):
        assert asks(url, ("abc",)) == [StepRewards([[1, 0.5]])]
        assert score(
            HTTPReward(url), ["p"], ["abc"], {}, completion_ids=[[7]], decode=lambda ids: "abc" * len(ids)
        ) == [0.5]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host", "an address looks like"),
        ("file:///etc/passwd", "an address looks like"),
        ("http://", "an address looks like"),
        ("http://host:99999", "Port out of range"),
        ("http://user:hunter2@host", "user name or password in the address"),
    ],
)
def test_invalid_addresses_are_refused(url, message):
    with pytest.raises(ValueError, match=message) as error:
        HTTPReward(url)
    assert "hunter2" not in str(error.value)


def test_invalid_settings_are_refused():
    for name, value in (("batch_size", 0), ("max_retries", -1), ("timeout_s", 0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            HTTPReward("http://localhost", **{name: value})
    with pytest.raises(ValueError, match="characters that a header cannot contain") as error:
        HTTPReward("http://localhost", token="to\nken")
    assert "ken" not in str(error.value).replace("token", "").replace("TOKEN", "")


def test_a_token_over_plain_http_beyond_this_machine_warns():
    with pytest.warns(UserWarning, match=r"the token for example\.org is sent over http"):
        HTTPReward("http://example.org", token="t")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HTTPReward("https://example.org", token="t")
        HTTPReward("http://127.0.0.1:1", token="t")
        HTTPReward("http://example.org")


def test_columns_that_json_cannot_hold_are_an_error_with_the_cause():
    with pytest.raises(RewardError, match="cannot be sent as JSON"):
        HTTPReward("http://127.0.0.1:1")(["p"], ["c"], thing=[object()])


def test_the_token_reaches_the_server_and_no_file(make_trainer, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "hush-hush")
    with answering(lambda n, items: scores(lengths(items))) as (url, seen):
        trainer = make_trainer(reward_funcs=url, total_episodes=8, save_every=1, http_batch_size=5)
        trainer.train()
    assert {request["headers"]["Authorization"] for request in seen} == {"Bearer hush-hush"}
    assert len(seen[0]["items"]) == 1  # at the start
    assert sorted(len(request["items"]) for request in seen[1:]) == [3, 5]  # side by side
    assert f"score/part/{url.removeprefix('http://')}" in trainer.run.read()[0]
    files = [file for file in trainer.run.path.rglob("*") if file.is_file()]
    assert len(files) > 5 and not any(b"hush-hush" in file.read_bytes() for file in files)


def test_an_address_is_a_reward_on_the_command_line(tmp_path, make_model, tokenizer):
    from rlhf_ppo.cli import main

    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"the cat {word}", "answer": i} for i, word in enumerate(("sat", "ran", "ate", "saw"))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with answering(lambda n, items: scores(lengths(items))) as (url, seen):
        flags = (
            f"train --model {tmp_path}/model --reward {url} --dataset {tmp_path}/prompts.jsonl --output-dir "
            f"{tmp_path}/run --total-episodes 4 --rollout-batch-size 4 --num-minibatches 2 --max-new-tokens 4 "
            "--eval-size 0 --device cpu --http-timeout-s 9 --http-retries 0 --quiet True"
        )
        assert main(flags.split()) == 0
    assert sorted(item["columns"]["answer"] for item in seen[1]["items"]) == [0, 1, 2, 3]
    assert [(item["completion"], item["columns"]) for item in seen[0]["items"]] == [("", {"answer": 0})]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "no answer after 1 attempts; the last failed: URLError"),
        ((404, b"", {}), "HTTP 404"),
        ((401, b"", {}), f"is {TOKEN_VARIABLE} right"),
        ((200, b"<html>", {}), "the answer is not JSON"),
        ((200, b'{"score": 1}', {}), "expected .*scores"),
        ((200, b'{"scores": [{"id": "0", "score": "good"}]}', {}), "returned str 'good'"),
    ],
    ids=["gone", "wrong-path", "wrong-token", "no-json", "no-scores", "no-number"],
)
def test_an_unusable_server_is_refused_at_the_start_in_one_line(
    tmp_path, make_model, tokenizer, capsys, monkeypatch, answer, message
):
    from rlhf_ppo.cli import main

    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n' * 4)
    monkeypatch.setattr("rlhf_ppo.training.models.load_models.load_policy", None)  # refused before
    capsys.readouterr()
    with answering(lambda n, items: answer) as (url, _):
        flags = f"train --model {tmp_path}/model --reward {url if answer else 'http://127.0.0.1:9'} --eval-size 0 "
        flags += f"--dataset {tmp_path}/prompts.jsonl --output-dir {tmp_path}/run --http-retries 0"
        assert main(flags.split()) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1 and "Start the server or correct the address" in err


def test_a_server_that_fails_in_the_run_leaves_no_traceback(make_trainer):
    with answering(lambda n, items: scores(lengths(items), 500 if n else 200)) as (url, _):
        trainer = make_trainer(reward_funcs=HTTPReward(url, max_retries=0))
        with pytest.raises(RewardError, match="HTTP 500") as error:
            trainer.train()
    assert error.value.__cause__ is None


@pytest.mark.parametrize("headers", [b"Content-Length: 100\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n10\r\nabc"])
@pytest.mark.parametrize("stalls", [True, False])
def test_a_failure_whose_text_never_ends_is_retried_as_one_with_a_text(headers, stalls):
    seen: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def fail() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 500 Oops\r\n" + headers)
                seen.append(connection)
                if not stalls:
                    connection.close()

        threading.Thread(target=fail, daemon=True).start()
        with pytest.raises(RewardError, match="no answer after 2 attempts; the last failed: HTTP 500 Oops"):
            asks(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=0.3, max_retries=1)
    assert len(seen) == 2
    for connection in seen:
        connection.close()
