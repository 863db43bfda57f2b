"""Viewers of a dashboard as a process of its own, so that their work is not charged to what they watch.

    python -m simulations.benchmarks.viewers ADDRESS PATH COUNT

The first line of standard input is a bearer token. After "on" it opens COUNT event streams and answers
"on" when each has had its first event; "off" closes them. It runs at the lowest priority, with what is
left of a core beside the dashboard's own server.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

LOWEST_PRIORITY = 19


class Viewers:
    """The process, as the one who measures holds it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def turn(self, word: str) -> None:
        """ "on" or "off"; returns when it is so."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(word, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline().strip()
        if answer != word:
            raise RuntimeError(f"the viewers said {answer!r} to {word!r}")


@contextmanager
def viewers(
    address: str, path: str, token: str, count: int, cores: Collection[int] = ()
) -> Iterator[Viewers]:
    """``count`` viewers of one stream, who look while they are turned on.

    ``cores``: the processors that they may use, all where none is named.
    """

    def prepare() -> None:
        os.nice(LOWEST_PRIORITY)
        if cores:
            os.sched_setaffinity(0, cores)

    process = subprocess.Popen(
        [sys.executable, "-m", "simulations.benchmarks.viewers", address, path, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )
    assert process.stdin is not None
    try:
        print(token, file=process.stdin, flush=True)
        yield Viewers(process)
    finally:
        process.terminate()
        process.wait()


async def view(
    address: str, path: str, token: str, arrived: list[float], ready: asyncio.Event
) -> None:
    """One viewer: the times of its events, until it is cancelled."""
    host, _, port = address.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 22)
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    )
    try:
        while line := await reader.readline():
            if line.startswith(b"data:"):
                arrived.append(time.time())
                ready.set()
    finally:
        writer.close()


async def _work(address: str, path: str, count: int) -> None:
    loop = asyncio.get_running_loop()
    token = (await loop.run_in_executor(None, sys.stdin.readline)).strip()
    watching: list[asyncio.Task[None]] = []
    while word := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        if word == "on":
            ready = [asyncio.Event() for _ in range(count)]
            watching = [
                asyncio.create_task(view(address, path, token, [], event)) for event in ready
            ]
            await asyncio.gather(*(event.wait() for event in ready))
        else:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
        print(word, flush=True)


if __name__ == "__main__":
    asyncio.run(_work(sys.argv[1], sys.argv[2], int(sys.argv[3])))
