"""RewardServer: client and server end to end on this machine; clients that are wrong, slow, many or hostile."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ppo import HTTPReward
from rlhf_ppo.rewards.http_client import TOKEN_VARIABLE
from rlhf_ppo.rewards.http_server import BadRequestError, RewardServer, read_items
from rlhf_ppo.rewards.loading import load_reward
from rlhf_ppo.rewards.scoring import score
from rlhf_ppo.rewards.validation import RewardError


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def weigh(prompts, completions, weight, **columns):
    """The length of each completion times its row's weight; one that says "boom" breaks it."""
    if "boom" in completions:
        raise ZeroDivisionError("the secret of the server")
    return [None if text == "?" else len(text) * w for text, w in zip(completions, weight, strict=True)]


@contextmanager
def serving(reward: Any = weigh, **options: Any):
    """A running server; yields (host, port)."""
    server = RewardServer(reward, port=0, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.server_address[:2]
    finally:
        server.shutdown()
        server.server_close()


def client(address: tuple[str, int], **options: Any) -> HTTPReward:
    return HTTPReward(f"http://{address[0]}:{address[1]}", **{"backoff_s": 0.01, "timeout_s": 60.0, **options})


def body_of(completion: str = "ab", **columns: Any) -> bytes:
    item = {"id": "1", "prompt": "p", "completion": completion, "columns": {"weight": 1, **columns}}
    return json.dumps({"items": [item]}).encode()


def head(length: Any, *more: str) -> bytes:
    lines = ["POST / HTTP/1.1", "Host: here", "Content-Type: application/json", f"Content-Length: {length}", *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def raw(address: tuple[str, int], *pieces: bytes, half_close: bool = False) -> tuple[int, bytes]:
    """Status and body of what comes back for these bytes, as they are; 0 if the server hangs up without a word."""
    with socket.create_connection(address, timeout=60) as connection:
        with suppress(OSError):  # a refused body need not have been read
            for piece in pieces:
                connection.sendall(piece)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(OSError):
            while piece := connection.recv(65536):
                received += piece
    status, _, rest = received.partition(b"\r\n")
    if not status.startswith(b"HTTP"):  # to what is no HTTP the answer is a page about error 400, without a head
        return (400 if b"400" in received else 0), received
    return int(status.split()[1]), rest.partition(b"\r\n\r\n")[2]


# One client


def test_client_and_server_end_to_end():
    with serving() as address:
        reward = load_reward(f"http://{address[0]}:{address[1]}", device="cpu", http_batch_size=2)
        given = {"weight": [1, 2, 3], "note": ["x", None, {"deep": [1.5]}]}
        assert reward(["p"] * 3, ["aa", "?", "c"], **given) == [2.0, None, 3.0]
        assert score(reward, ["p"], ["é€😀"], {"weight": [2]}, completion_ids=[[1, 2]]) == [6.0]


def test_it_listens_on_this_machine_by_default():
    for options, host in (({}, "127.0.0.1"), ({"host": "0.0.0.0"}, "0.0.0.0")):
        server = RewardServer(weigh, port=0, **options)
        assert server.server_address[0] == host
        server.server_close()


def test_the_example_serves_a_function_by_name(monkeypatch, capsys):
    import runpy
    from pathlib import Path

    example = runpy.run_path(str(Path(__file__).parents[3] / "examples/reward_server.py"))
    monkeypatch.setenv(TOKEN_VARIABLE, "t")
    served: list[float | None] = []

    def serve_one(server: RewardServer) -> None:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        served.extend(client(server.server_address[:2])(["p"], ["no vowel"]))
        thread.join(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardServer, "serve_forever", serve_one)
    example["main"](["--reward", "rlhf_ppo.rewards.toy:no_letter_e", "--port", "0"])
    assert len(served) == 1 and "no_letter_e at http://127.0.0.1:" in capsys.readouterr().out


# Clients that are wrong


def test_a_wrong_token_is_refused_without_retries_and_never_shown(monkeypatch, capsys):
    with serving(token="right-token") as address:
        for token in (None, "wrong-token", "right-tokem", "right-toke", "right-token-and-more"):
            with pytest.raises(RewardError, match=r"HTTP 401.*is RLHF_PPO_REWARD_TOKEN right") as error:
                client(address, token=token)(["p"], ["a"], weight=[1])
            assert "token" not in str(error.value).replace("RLHF_PPO_REWARD_TOKEN", "").replace("missing token", "")
        monkeypatch.setenv(TOKEN_VARIABLE, "right-token\n")
        assert client(address)(["p"], ["abc"], weight=[1]) == [3.0]
    assert "-token" not in capsys.readouterr().err


def test_the_token_is_compared_in_constant_time(monkeypatch):
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("rlhf_ppo.rewards.http_server.hmac.compare_digest", compare)
    with serving(token="right") as address:
        assert raw(address, head(0, "Authorization: Bearer wrong"))[0] == 401
        assert raw(address, head(0, "Authorization: right"))[0] == 401
        assert raw(address, head(len(body_of()), "Authorization: Bearer right"), body_of())[0] == 200
    assert compared == [(given, b"Bearer right") for given in (b"Bearer wrong", b"right", b"Bearer right")]


def test_without_a_token_the_body_is_not_read_and_the_reward_not_called():
    """The token is looked at before the body: 8 MiB of anybody's are not worth the memory."""

    def never(prompts, completions, **columns):
        raise AssertionError("asked")

    with serving(never, token="right") as address:
        # Only the head is sent; who waited for the body would wait for request_s.
        start = time.monotonic()
        assert raw(address, head(2**20), half_close=True)[0] == 401
        assert time.monotonic() - start < 25


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"no json", 400),
        (b"[" * 100_000, 400),
        (b"1" * 10_000, 400),
        (b'\xff\xfe{"items"', 400),
        (b"[]", 400),
        (b'{"items": []}', 400),
        (b'{"items": [{"id": 1, "prompt": "p", "completion": "c"}]}', 400),
        (b'{"items": [{"id": "1", "prompt": "p"}]}', 400),
        (b'{"items": [{"id": "1", "prompt": "p", "completion": "c", "columns": [1]}]}', 400),
        (json.dumps({"items": [{"id": "1", "prompt": "p", "completion": "c"}] * 2}).encode(), 400),
        (body_of("boom"), 500),
        (body_of(prompts=1), 500),
        (b" " * 2000, 413),
    ],
)
def test_garbage_is_refused_and_the_server_survives(body, status, capsys):
    limit = 1000 if status == 413 else 2**20
    with serving(max_bytes=limit) as address:
        code, said = raw(address, head(len(body)), body)
        assert code == status
        # What went wrong inside is the server's own business, and what came in is not sent back.
        assert b"secret" not in said and b"boom" not in said and "error" in json.loads(said)
        assert client(address)(["p"], ["ab"], weight=[1]) == [2.0]
    assert ("raised" in capsys.readouterr().out) == (status == 500)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST / HTTP/1.1\r\nContent-Type: application/json\r\n\r\n" + body_of(), 411),  # none
        (head("-5") + body_of(), 411),
        (head("0x10") + body_of(), 411),
        (head("٣") + body_of(), 411),
        (head("9" * 30), 413),
        (head(10**9), 413),
        (head(3) + body_of(), 400),  # it says less than it sends
        (head(10_000) + body_of(), 400),  # it says more
        (head(len(body_of())).replace(b"application/json", b"text/plain") + body_of(), 415),
        (b"GET / HTTP/1.1\r\n\r\n", 501),
        (b"POST " + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"POST / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"\r\n\r\n", 0),
        (b"", 0),
    ],
)
def test_a_wrong_content_length_and_invalid_requests_are_refused(request_bytes, status):
    with serving() as address:
        assert raw(address, request_bytes, half_close=True)[0] == status
        assert client(address)(["p"], ["ab"], weight=[1]) == [2.0]


def test_a_large_body_is_refused_with_a_readable_answer():
    with serving(max_bytes=2**20) as address:
        assert raw(address, head(2 * 2**20), b" " * (2 * 2**20))[0] == 413


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ITEM = st.fixed_dictionaries(
    {"id": st.text(max_size=2) | JSON, "prompt": JSON, "completion": JSON}, optional={"columns": JSON}
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    st.binary(max_size=40) | JSON.map(json.dumps) | st.lists(ITEM, max_size=3).map(lambda i: json.dumps({"items": i}))
)
def test_any_body_is_items_or_a_bad_request(body):
    try:
        items = read_items(body if isinstance(body, bytes) else body.encode())
    except BadRequestError:
        return
    assert items and len({item["id"] for item in items}) == len(items)


# Clients that are slow


def test_slow_clients_end_at_the_deadline_and_block_nobody():
    """One sends its head byte by byte, one its body, one nothing, one never reads its answer."""

    def drip(connection: socket.socket, content: bytes) -> None:
        with suppress(OSError):
            for byte in content:
                connection.sendall(bytes([byte]))
                if ended.wait(0.02):
                    return

    ended = threading.Event()
    with serving(request_s=1.0) as address:
        slow = [socket.create_connection(address, timeout=60) for _ in range(4)]
        for connection, content in zip(slow, (head(10) * 50, b" " * 5000, b"", head(len(body_of()))), strict=True):
            if content.isspace():
                connection.sendall(head(5000))
            threading.Thread(target=drip, args=(connection, content), daemon=True).start()
        # Others are answered meanwhile.
        assert client(address)(["p"] * 3, ["a", "bb", "ccc"], weight=[1, 1, 1]) == [1.0, 2.0, 3.0]
        # Hung up although each byte came well within the time that a socket waits for one; recv would time out.
        for connection in slow:
            with suppress(ConnectionResetError):
                while connection.recv(65536):
                    pass
        ended.set()
        for connection in slow:
            connection.close()


def test_connections_above_the_limit_get_a_503():
    with serving(max_connections=2, request_s=30.0) as address:
        idle = [socket.create_connection(address, timeout=60) for _ in range(2)]
        deadline = time.monotonic() + 60
        while raw(address, head(2), half_close=True)[0] != 503:  # until both are accepted
            assert time.monotonic() < deadline
        for connection in idle:
            connection.close()
        assert client(address, max_retries=20)(["p"], ["ab"], weight=[1]) == [2.0]


# Clients that are many


def test_a_served_model_is_called_by_one_thread_at_a_time():
    inside = threading.Lock()

    def alone(prompts, completions, **columns):
        assert inside.acquire(blocking=False)
        time.sleep(0.01)
        inside.release()
        return [1.0] * len(prompts)

    with serving(alone) as address, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client(address)(["p"], ["a"]), range(8)))
    assert answers == [[1.0]] * 8


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_simultaneous_requests_all_get_their_own_answers(count):
    """Each connection is open before the first is answered, and nobody tries twice."""
    everybody = threading.Barrier(count)

    def ask(i: int) -> Any:
        everybody.wait(300)
        return client(address, max_retries=0, timeout_s=300)(["p"], ["x" * (i % 7)], weight=[i])

    with serving() as address, ThreadPoolExecutor(count) as pool:
        assert list(pool.map(ask, range(count))) == [[float(i % 7 * i)] for i in range(count)]
