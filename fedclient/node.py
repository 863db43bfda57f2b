"""Who a node is, what it is asked, and how it says no: what the thin ClientApp needs to know.

Nothing here imports torch, so that the process which Flower starts for every message stays small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# What a message asks for; Flower's message types have the same names.
Kind = Literal["query", "train", "evaluate"]


@dataclass(frozen=True)
class NodeSettings:
    """A node's own settings.

    ``index``: the part of the scenario's data whose owner it plays, without ``name`` the scenario's node
    there; it needs this or ``data``, a file of its own.
    ``key``: file of the key that signs its replies, made when it is missing; None: they are not signed.
    ``worker``: the socket of the resident worker that answers; None: the process that is asked does.
    """

    index: int | None = None
    name: str | None = None
    data: str | None = None
    rank_limit: int = 1 << 16
    key: str | None = None
    worker: str | None = None


# What a node does with a message's bytes; raises ``Refused`` where it cannot.
Answer = Callable[[Kind, bytes, NodeSettings], bytes]


class Refused(Exception):
    """Why there is no answer, in one line for the coordinator.

    ``reason`` is a word for programs: "node" (its base, data or training does not fit the plan),
    "deadline", "cancelled", "paused", "memory", "died" (the worker, again and again), "unreachable",
    "restarted" (an edge, which has to be queried again).
    """

    def __init__(self, text: str, reason: str = "node") -> None:
        super().__init__(text)
        self.reason = reason
