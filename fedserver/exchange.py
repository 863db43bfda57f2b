"""One question to many nodes over Flower's Grid: push, then pull until all answered or time is up.

Flower's ``send_and_receive`` and stock strategies wait for ever or die on one bad reply. Here a reply
is a value whatever happened to it, and one that comes after its round is told from one that does not
come at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

RECORD = "fedbraid"
POLL_SECONDS = 0.1
# A late reply is still worth a verdict, so Flower keeps the message this much longer.
LATE_GRACE_SECONDS = 600.0

QUERY, TRAIN, EVALUATE = MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE


class Clock(Protocol):
    """Where time comes from: the machine's clock, or a simulation's."""

    def now(self) -> float:
        """Seconds since an arbitrary start."""
        ...

    def wait(self, seconds: float) -> None:
        """Let this much time pass."""
        ...


class MachineClock:
    """Real time."""

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


@dataclass(frozen=True)
class Reply:
    """What came back from a node. ``payload`` is None when ``error`` says why there is none."""

    node_id: int
    round: int
    payload: bytes | None
    error: str
    seconds: float
    late: bool = False


class Exchange:
    """Asks nodes over a grid and remembers the messages that nobody has answered yet."""

    def __init__(self, grid: Grid, clock: Clock) -> None:
        self._grid = grid
        self._clock = clock
        self._overdue: dict[str, tuple[int, int]] = {}

    @property
    def real_time(self) -> bool:
        """Whether deadlines are of the machine's clock, not of a simulation's."""
        return isinstance(self._clock, MachineClock)

    def nodes(self) -> list[int]:
        """Flower's ids of the nodes that are connected now."""
        return sorted(self._grid.get_node_ids())

    def wait(self, seconds: float) -> None:
        """Let time pass on this exchange's clock."""
        self._clock.wait(seconds)

    def ask(
        self, payloads: Mapping[int, bytes], kind: str, round_number: int, deadline: float
    ) -> Iterator[Reply]:
        """Send each node its bytes and yield replies, late ones of earlier rounds too.

        Ends when all have answered or after ``deadline`` seconds. Nodes that stay silent are not
        yielded: the caller knows whom it asked.
        """
        start = self._clock.now()
        waiting: dict[str, tuple[int, int]] = {}
        for node_id, payload in payloads.items():
            message = Message(
                RecordDict({RECORD: ConfigRecord({"payload": payload})}),
                node_id,
                kind,
                ttl=deadline + LATE_GRACE_SECONDS,
                group_id=str(round_number),
            )
            sent = list(self._grid.push_messages([message]))
            if sent and sent[0]:
                waiting[sent[0]] = (node_id, round_number)
            else:
                yield Reply(node_id, round_number, None, "the message could not be sent", 0.0)
        while waiting and self._clock.now() - start < deadline:
            replies = list(self._grid.pull_messages([*waiting, *self._overdue]))
            # A node that answers twice is seen twice; both copies belong to the same question.
            known = {**waiting, **self._overdue}
            for message in replies:
                asked = known.get(message.metadata.reply_to_message_id)
                if asked is None:
                    continue
                late = message.metadata.reply_to_message_id in self._overdue
                if late and message.has_error():
                    continue
                yield _read(message, *asked, late, self._clock.now() - start)
            for message in replies:
                waiting.pop(message.metadata.reply_to_message_id, None)
                self._overdue.pop(message.metadata.reply_to_message_id, None)
            if waiting and not replies:
                self._clock.wait(POLL_SECONDS)
        self._overdue.update(waiting)


def _read(message: Message, node_id: int, round_number: int, late: bool, waited: float) -> Reply:
    if message.has_error():
        error = message.error
        reason = f"node failed (Flower error {error.code}): {_first_line(error.reason)}"
        return Reply(node_id, round_number, None, reason, waited, late)
    record = message.content.get(RECORD)
    if not isinstance(record, ConfigRecord):
        return Reply(node_id, round_number, b"", "", waited, late)
    error_text, payload, seconds = (record.get(key) for key in ("error", "payload", "seconds"))
    taken = float(seconds) if isinstance(seconds, float) and seconds >= 0 else waited
    if isinstance(error_text, str) and error_text:
        return Reply(node_id, round_number, None, _first_line(error_text), taken, late)
    return Reply(
        node_id, round_number, payload if isinstance(payload, bytes) else b"", "", taken, late
    )


def _first_line(text: str | None) -> str:
    """A node's words, cut to one printable line: they end up in tables and in the ledger."""
    lines = (text or "").strip().splitlines() or ["no reason given"]
    return "".join(c for c in lines[0] if c.isprintable())[:300]
