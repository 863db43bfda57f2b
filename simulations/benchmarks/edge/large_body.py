"""A body of a gigabyte: refused with 413, and the server's memory hardly notices."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from fedhost.ports import LOOPBACK
from simulations.benchmarks.edge.server import PULL, Device, Server

CHUNK = 1 << 20
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class LargeBody:
    """What came of it. ``sent``: bytes that the server let be sent; ``growth``: its memory, in bytes."""

    statuses: dict[str, int]
    sent: int
    growth: int


def send_large_bodies(server: Server, device: Device, size: int) -> LargeBody:
    """Send ``size`` bytes: announced without and with credentials, and in chunks of unknown number."""
    before = server.memory_bytes()
    highest = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_SECONDS):
            highest[0] = max(highest[0], server.memory_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    known = {"Content-Length": str(size)}
    chunked = {"Transfer-Encoding": "chunked"}
    try:
        tries = {
            "no credentials": _send(server, known, size),
            "a node, size announced": _send(server, device.headers() | known, size),
            "a node, in chunks": _send(server, device.headers() | chunked, size),
        }
    finally:
        done.set()
        watcher.join()
    highest[0] = max(highest[0], server.memory_bytes())
    return LargeBody(
        {name: status for name, (status, _) in tries.items()},
        sum(sent for _, sent in tries.values()),
        highest[0] - before,
    )


def _send(server: Server, headers: Mapping[str, str], size: int) -> tuple[int, int]:
    """Status of the answer, and how many bytes went out before it came."""
    lines = [f"POST {PULL} HTTP/1.1", "Host: localhost", *(f"{k}: {v}" for k, v in headers.items())]
    chunk = bytes(CHUNK)
    framed = f"{CHUNK:x}\r\n".encode() + chunk + b"\r\n"
    piece = framed if "Transfer-Encoding" in headers else chunk
    with (
        socket.create_connection((LOOPBACK, server.settings.port), timeout=60.0) as plain,
        server.tls().wrap_socket(plain, server_hostname=LOOPBACK) as connection,
    ):
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        sent = 0
        try:
            while sent < size:
                connection.settimeout(0.0)
                try:
                    early = connection.recv(4096)
                except OSError:
                    early = b""
                if early:
                    return _status(early), sent
                connection.settimeout(60.0)
                connection.sendall(piece)
                sent += CHUNK
        except OSError:
            # The server closed its side; what it said may still be there.
            pass
        connection.settimeout(60.0)
        try:
            return _status(connection.recv(4096)), sent
        except OSError:
            return 0, sent


def _status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0
