"""Verifying ledgers for all who ask: one at a time, once for all who ask about the same one meanwhile.

Every viewer may ask, and each verification is a process with torch that reads a whole run. They wait
here without a thread, so that pages go on however many ask.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fedserver.dashboard import recording

MOST_AT_ONCE = 8
"""So many ledgers are verified or wait for it; whoever asks for one more is told to come again."""


class VerificationError(Exception):
    """A ledger is not verified now; the message says what to do."""


class Verifications:
    """The verifications under way, by folder. Belongs to the event loop that it is used in."""

    def __init__(self) -> None:
        self._asked: dict[Path, asyncio.Task[dict[str, Any]]] = {}
        self._one = asyncio.Lock()

    async def verify(self, folder: Path) -> dict[str, Any]:
        """``problems``, ``height`` and ``head`` of a ledger, every entry and blob hashed again.

        Raises:
            VerificationError: too many others are verified or wait for it.
        """
        task = self._asked.get(folder)
        if task is None:
            if len(self._asked) >= MOST_AT_ONCE:
                raise VerificationError(
                    f"{MOST_AT_ONCE} ledgers are being verified: try again later, or run"
                    " fedbraid ledger verify"
                )
            task = self._asked[folder] = asyncio.create_task(self._run(folder))
            task.add_done_callback(lambda done: self._asked.pop(folder, None))
        # Who goes away does not take the answer from the others.
        return await asyncio.shield(task)

    async def _run(self, folder: Path) -> dict[str, Any]:
        async with self._one:
            return await recording.verify(folder)
