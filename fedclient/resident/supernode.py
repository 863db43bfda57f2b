"""Flower's SuperNode with waits that fit: ``python -m fedclient.resident.supernode ARGUMENTS``.

The SuperNode looks for a message every 3 s, whatever was before; over two nodes that alone is two
seconds of every round. Here it looks soon after a message was handled, and ever more rarely while none
comes: a hundred idle nodes must not keep a SuperLink busy.
"""

from __future__ import annotations

import time
from typing import Any

from flwr.supercore.corestate import in_memory_corestate
from flwr.supernode import start_client_internal

SHORTEST, LONGEST, GROWTH = 0.25, 3.0, 1.2
REPLY_SECONDS = 0.1
# Of Flower's 30 s. A ClientApp tells that it lives every 18 to 23 s; without word of it for this many
# intervals it was killed, and the SuperNode takes no other message until then.
PATIENCE = 1


class Waits:
    """Stands for the module ``time`` in Flower's loop.

    It sleeps for 3 s there where it is idle, for half a second where it waits for a ClientApp's reply.
    """

    def __init__(self) -> None:
        self._idle = SHORTEST

    def sleep(self, seconds: float) -> None:
        """Wait as long as the loop's state suggests, never longer than was asked."""
        if seconds < 1.0:
            self._idle = SHORTEST
            time.sleep(min(seconds, REPLY_SECONDS))
            return
        time.sleep(min(seconds, self._idle))
        self._idle = min(self._idle * GROWTH, LONGEST)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def shorten_waits() -> None:
    """Give this process's SuperNode these waits."""
    vars(start_client_internal)["time"] = Waits()
    vars(in_memory_corestate)["HEARTBEAT_PATIENCE"] = PATIENCE


if __name__ == "__main__":
    from flwr.supernode.cli.flower_supernode import flower_supernode

    shorten_waits()
    flower_supernode()
