"""Sockets that keep a server waiting, while an honest node goes on with its work.

Four kinds in equal number: no TLS handshake; a header that trickles; a body that was announced without
credentials; the same from a node that has joined (which nginx lets have 32 at a time).
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fedhost.ports import LOOPBACK
from simulations.benchmarks.edge.server import PULL, Device, Door, Server

# The attacker has an address of its own, as it would elsewhere; all of 127/8 is this host on Linux.
ATTACKER = "127.0.0.66"
HONEST_PAUSE = 0.1
GIVE_UP_SECONDS = 120.0


@dataclass(frozen=True)
class SlowSockets:
    """Seconds until the server had cut each socket; latencies of the honest node, in seconds."""

    lifetimes: Sequence[float]
    latencies: Sequence[float]
    failures: int

    @property
    def p99(self) -> float:
        """The honest node's 99th percentile."""
        return sorted(self.latencies)[min(int(0.99 * len(self.latencies)), len(self.latencies) - 1)]


def hold_sockets(server: Server, honest: Device, attacker: Device, count: int) -> SlowSockets:
    """Open ``count`` slow sockets at once and wait until all are cut."""
    latencies: list[float] = []
    failures: list[int] = []
    done = threading.Event()

    def work() -> None:
        door = Door(server)
        while not done.is_set():
            started = time.monotonic()
            status, _ = door.ask("POST", PULL, honest.headers(), honest.pull())
            latencies.append(time.monotonic() - started)
            if status != 200:
                failures.append(status)
            done.wait(HONEST_PAUSE)
        door.close()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        lifetimes = asyncio.run(_hold_all(server, attacker, count))
    finally:
        done.set()
        worker.join()
    return SlowSockets(lifetimes, latencies, len(failures))


async def _hold_all(server: Server, attacker: Device, count: int) -> list[float]:
    context = server.tls()
    return list(
        await asyncio.gather(
            *(_hold(server, attacker, context, number % 4) for number in range(count))
        )
    )


async def _hold(server: Server, attacker: Device, context: ssl.SSLContext, kind: int) -> float:
    """One socket; how long the server kept it, in seconds from its opening."""
    started = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection(
            LOOPBACK, server.settings.port, local_addr=(ATTACKER, 0),
            ssl=context if kind else None, server_hostname=LOOPBACK if kind else None,
        )  # fmt: skip
    except OSError:
        return time.monotonic() - started
    if kind == 1:
        writer.write(f"POST {PULL} HTTP/1.1\r\nHost: localhost\r\nX-Slow: ".encode())
    elif kind > 1:
        own = attacker.headers() if kind == 3 else {}
        lines = [f"{key}: {value}" for key, value in (own | {"Content-Length": "100000"}).items()]
        head = "\r\n".join([f"POST {PULL} HTTP/1.1", "Host: localhost", *lines, "", "x"])
        writer.write(head.encode())
    try:
        async with asyncio.timeout(GIVE_UP_SECONDS):
            while True:
                try:
                    async with asyncio.timeout(1.0):
                        if not await reader.read(4096):
                            break
                except TimeoutError:
                    if kind == 1:
                        writer.write(b"x")
    except (TimeoutError, OSError):
        pass
    lifetime = time.monotonic() - started
    writer.transport.abort()
    return lifetime
