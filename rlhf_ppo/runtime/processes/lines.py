"""Lines: JSON messages between the first process and another, and the end of such a connection."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from typing import Any, NamedTuple

from rlhf_ppo.runtime.errors import RunError

UNREACHABLE_S = 15
"""Seconds after which a machine that no longer answers counts as lost."""
KILLED = "ended without a word: it was killed (perhaps for memory: see dmesg) or crashed"
UNREACHABLE = "can no longer be reached: its machine or the network failed"


class Address(NamedTuple):
    """Where the first process listens, and what a connection must begin with."""

    host: str
    port: int
    token: str


class Line:
    """A connection to another process."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        """Describe a connection to ``peer``, in words."""
        self.socket, self.peer = connection, peer
        self.end = ""
        """How the connection ended; empty while it is open."""
        self._sending = threading.Lock()
        self._unread = b""
        _keep_alive(connection)

    @classmethod
    def accepted(cls, server: socket.socket, token: str) -> tuple[int, Line]:
        """Accept a connection; returns the other's rank, too.

        Raises:
            OSError, ValueError: it is no process of this run.
        """
        connection, _ = server.accept()
        connection.settimeout(5)
        said = b""
        while not said.endswith(b"\n"):
            more = connection.recv(1) if len(said) < 1000 else b""
            if not more:
                raise ValueError("no process of this run")
            said += more
        hello = json.loads(said)
        if not secrets.compare_digest(str(hello.get("token")), token):
            connection.close()
            raise ValueError("no process of this run")
        connection.settimeout(None)
        return int(hello["rank"]), cls(connection, str(hello["name"]))

    def send(self, message: dict[str, Any]) -> bool:
        """Send a message; returns whether the connection took it."""
        try:
            with self._sending:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]]:
        """Read the messages that have come; sets ``end`` if no more will."""
        try:
            read = self.socket.recv(2**16)
        except ConnectionResetError:
            read = b""
        except OSError:
            self.end = UNREACHABLE
            return []
        self.end = "" if read else KILLED
        *whole, self._unread = (self._unread + read).split(b"\n")
        return [json.loads(line) for line in whole]


def listen(*, local: bool) -> tuple[socket.socket, Address]:
    """Listen on a free port, on this machine alone if ``local``."""
    if local:
        server = socket.create_server(("127.0.0.1", 0))
        host = "127.0.0.1"
    else:
        both = socket.has_dualstack_ipv6()
        server = socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
        host = os.environ["MASTER_ADDR"]  # which is this machine: torch's store is found there, too
    return server, Address(host, server.getsockname()[1], secrets.token_hex(16))


def connect(address: Address, rank: int) -> Line:
    """Connect process ``rank`` with the first one.

    Raises:
        RunError: it does not answer.
    """
    host, port, token = address
    try:
        connection = socket.create_connection((host, port), timeout=UNREACHABLE_S)
    except OSError as error:
        raise RunError(
            f"process {rank} on {socket.gethostname()} cannot reach the first process at {host}:{port} "
            f"({error}): let the machines of a run connect to each other on all ports"
        ) from None
    connection.settimeout(None)
    line = Line(connection, "the first process")
    line.send({"rank": rank, "token": token, "name": f"{socket.gethostname()}, pid {os.getpid()}"})
    return line


def _keep_alive(connection: socket.socket) -> None:
    """Let the operating system notice a machine that is gone, without a message of ours: it answers for a busy one."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    options = {"TCP_KEEPIDLE": 5, "TCP_KEEPALIVE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 5}
    for name, value in {**options, "TCP_USER_TIMEOUT": UNREACHABLE_S * 1000}.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
