"""Server-sent events: one watcher a run however many look on, and the same bytes for all of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from anyio import to_thread

from fedserver.dashboard.sound_values import plain

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.2
HEARTBEAT_SECONDS = 15.0
RETRY_MILLISECONDS = 1000

Stamp = Callable[[], Any]
Payload = Callable[[], dict[str, Any]]


class Channel:
    """What one kind of page of one run is told: a payload whenever its stamp has changed.

    A viewer who is slow misses what was replaced meanwhile, and never the newest.
    """

    def __init__(self, stamp: Stamp, payload: Payload) -> None:
        self.viewers = 0
        self._stamp = stamp
        self._payload = payload
        self._version = 0
        self._message = b""
        self._changed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    async def messages(self, alive: Callable[[], bool]) -> AsyncIterator[bytes]:
        """Bytes of the event stream, from the present state on, while ``alive``."""
        self.viewers += 1
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        seen = 0
        try:
            yield f"retry: {RETRY_MILLISECONDS}\n\n".encode()
            while alive():
                if self._version > seen:
                    seen = self._version
                    yield self._message
                    continue
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await self._changed.wait()
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            self.viewers -= 1
            if not self.viewers and self._watcher is not None:
                self._watcher.cancel()
                self._watcher = None

    async def _watch(self) -> None:
        # A file that changes while it is read changes its stamp again.
        before: Any = None
        while True:
            stamp = await to_thread.run_sync(self._stamp)
            if stamp != before:
                before = stamp
                try:
                    payload = await to_thread.run_sync(self._payload) | {"version": version(stamp)}
                except Exception:
                    # The stream of a page outlives one state of a folder that cannot be shown.
                    logger.exception("a view could not be made for its viewers")
                    await asyncio.sleep(WATCH_SECONDS)
                    continue
                self._version += 1
                self._message = _event(self._version, payload | {"sent": time.time()})
                waiting, self._changed = self._changed, asyncio.Event()
                waiting.set()
            await asyncio.sleep(WATCH_SECONDS)


class Channels:
    """All channels that somebody looks at."""

    def __init__(self) -> None:
        self._channels: dict[tuple[str, str], Channel] = {}

    def channel(self, kind: str, name: str, stamp: Stamp, payload: Payload) -> Channel:
        """The channel of a page; forgotten ones are dropped on the way."""
        for key in [k for k, c in self._channels.items() if not c.viewers]:
            del self._channels[key]
        return self._channels.setdefault((kind, name), Channel(stamp, payload))

    @property
    def viewers(self) -> int:
        """How many streams are open."""
        return sum(channel.viewers for channel in self._channels.values())


def version(stamp: Any) -> str:
    """A stamp in short: a page that names another one than its stream does is out of date."""
    return hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]


def _event(number: int, payload: dict[str, Any]) -> bytes:
    return f"id: {number}\ndata: {json.dumps(plain(payload), allow_nan=False)}\n\n".encode()
