"""One question to many nodes over Flower's Grid: push, then pull until it is answered or time is up.

Flower's ``send_and_receive`` and stock strategies wait for ever or die on one bad reply. Here a reply is
a value whatever happened to it, one that comes after its round is told from one that does not come at
all, and a question that was lost on the way is put again: a node answers it with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from flwr.app import ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from fedhost.payloads import RECORD, from_records, to_records

# By how much the node's process grew, its peak of resident memory, and that of its accelerator.
MEMORY = ("grown", "resident", "accelerator")
POLL_SECONDS = 0.2
# A late reply is still worth a verdict, and a node's clock may be ten minutes off: Flower compares the
# two clocks, and drops what is older than this beyond the deadline.
LATE_GRACE_SECONDS = 900.0
# Nodes that come, come back, or were shut out are looked for this often.
NEWCOMERS_SECONDS = 2.0
# A node that is away is asked again this often; a ClientApp that was killed, at once and so many times.
AWAY_SECONDS = 5.0
ATTEMPTS = 4

# Flower's errors that say nothing of the work itself: a message or its objects were lost, the node is
# not there, its ClientApp was killed.
NODE_AWAY, APP_KILLED = 5, 8
LOST = (3, 4, NODE_AWAY, APP_KILLED)
# What a stub says for a resident worker that is being restarted, or was given another question.
WORKER_AWAY = ("unreachable", "cancelled")
# What an edge says that was started again and no longer knows its devices: it is to be queried anew.
FORGOTTEN = "restarted"

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


class Abandoned(Exception):
    """A question was given up because its run is to stop."""


class Newcomers(Protocol):
    """Who decides about nodes that connect in the middle of a run."""

    query: bytes

    def joined(self, node_id: int, capabilities: bytes) -> int | None:
        """A node has answered the query; returns the id of the node that it replaces, if any."""
        ...


@dataclass(frozen=True)
class Reply:
    """What came back from a node. ``payload`` is None when ``error`` says why there is none.

    ``node_id`` is the node that was asked, even where another one of its name has answered.
    ``memory``: what the node measured, by what (``MEMORY``), in bytes; nobody checks it.
    """

    node_id: int
    round: int
    payload: bytes | None
    error: str
    seconds: float
    late: bool = False
    memory: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sent:
    """One question on its way. ``address``: Flower's id of the node that has it now."""

    node_id: int
    round: int
    kind: str
    payload: bytes
    ttl: float
    address: int
    attempts: int = 1


class Exchange:
    """Asks nodes over a grid and remembers the messages that nobody has answered yet."""

    def __init__(self, grid: Grid, clock: Clock) -> None:
        self._grid = grid
        self._clock = clock
        self._overdue: dict[str, _Sent] = {}
        self._away: list[tuple[float, _Sent]] = []
        self._queries: dict[str, int] = {}
        self._known: set[int] = set()
        self._looked = float("-inf")

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

    def repeat(
        self, node_id: int, payload: bytes, kind: str, round_number: int, ttl: float
    ) -> None:
        """Put a question of an earlier round again: its answer comes with a later round's."""
        sent = _Sent(node_id, round_number, kind, payload, ttl + LATE_GRACE_SECONDS, node_id)
        if identity := self._push(sent):
            self._overdue[identity] = sent

    def forget(self, before_round: int) -> None:
        """Hear no more answers to questions of rounds before this one."""
        self._overdue = {i: s for i, s in self._overdue.items() if s.round >= before_round}

    def meet(self, newcomers: Newcomers) -> None:
        """Look for nodes that connect while nobody is asked anything, and hear who they are."""
        self._look_for_newcomers(newcomers.query)
        if not self._queries:
            return
        # What answers to questions of rounds stays for the round that collects it.
        for message in list(self._grid.pull_messages(list(self._queries))):
            node_id = self._queries.pop(message.metadata.reply_to_message_id, None)
            if node_id is not None:
                self._welcome(node_id, message, newcomers, {})

    def ask(
        self,
        payloads: Mapping[int, bytes],
        kind: str,
        round_number: int,
        deadline: float,
        *,
        enough: Callable[[], bool] = lambda: False,
        grace: float | None = None,
        wait_for_late: bool = False,
        newcomers: Newcomers | None = None,
        sent: Callable[[], None] = lambda: None,
        leaves: Callable[[], Collection[int]] = tuple,
        stops: Callable[[], bool] = lambda: False,
    ) -> Iterator[Reply]:
        """Send each node its bytes, call ``sent``, and yield replies, late ones of earlier rounds too.

        Ends when all have answered, after ``deadline`` seconds, or ``grace`` seconds after ``enough``
        says so of what was yielded. ``wait_for_late``: not before answers to earlier questions have
        come, unless there is enough. Nodes that stay silent are not yielded: the caller knows whom it
        asked.

        ``leaves``: ids of nodes that are not waited for any longer. Raises Abandoned when ``stops``
        says so.
        """
        start, closing = self._clock.now(), float("inf")
        look_at = start
        waiting: dict[str, _Sent] = {}
        self._away = []
        ttl = deadline + LATE_GRACE_SECONDS
        self._known.update(payloads)
        for node_id, payload in payloads.items():
            self._send(_Sent(node_id, round_number, kind, payload, ttl, node_id), waiting)
        sent()
        if grace is not None and enough():
            # A server before this one had heard enough.
            closing = start + grace
        while (
            waiting
            or self._away
            or (wait_for_late and self._overdue and not enough())
            or (kind == QUERY and self._queries)
        ):
            now = self._clock.now()
            if now - start >= deadline or now >= closing:
                break
            if now >= look_at:
                look_at = now + NEWCOMERS_SECONDS
                if stops():
                    raise Abandoned
                gone = leaves()
                self._leave(gone, waiting)
                if kind == QUERY:
                    # One that was only cut off is met as a newcomer when it is back.
                    self._known.difference_update(gone)
            self._send_again(waiting)
            if newcomers is not None:
                self._look_for_newcomers(newcomers.query)
            pulled = self._pull(waiting)
            for message in pulled:
                identity = message.metadata.reply_to_message_id
                if (newcomer := self._queries.pop(identity, None)) is not None:
                    self._welcome(newcomer, message, newcomers, waiting)
                    continue
                late = identity in self._overdue
                # A node that answers twice is seen twice; both copies belong to the same question.
                question = waiting.get(identity) or self._overdue.get(identity)
                if question is None or self._lost(question, identity, message, waiting, late):
                    continue
                taken = self._clock.now() - start
                yield _read(message, question.node_id, question.round, late, taken)
            for message in pulled:
                waiting.pop(message.metadata.reply_to_message_id, None)
                self._overdue.pop(message.metadata.reply_to_message_id, None)
            if grace is not None and closing == float("inf") and enough():
                closing = self._clock.now() + grace
            elif not pulled:
                self._clock.wait(POLL_SECONDS)
        if kind == QUERY:
            # Who was not heard is met as a newcomer.
            self._known -= {sent.node_id for sent in waiting.values()}
        self._overdue.update(waiting)

    def _push(self, sent: _Sent) -> str:
        message = Message(
            to_records(sent.payload),
            sent.address,
            sent.kind,
            ttl=sent.ttl,
            group_id=str(sent.round),
        )
        return next(iter(self._grid.push_messages([message])), "") or ""

    def _pull(self, waiting: Iterable[str]) -> list[Message]:
        return list(self._grid.pull_messages([*self._overdue, *waiting, *self._queries]))

    def _send(self, sent: _Sent, waiting: dict[str, _Sent]) -> None:
        """Push a question; one that the SuperLink does not take, for a node that is away, waits."""
        if identity := self._push(sent):
            waiting[identity] = sent
        else:
            self._away.append((self._clock.now() + AWAY_SECONDS, sent))

    def _send_again(self, waiting: dict[str, _Sent]) -> None:
        due = [sent for time, sent in self._away if time <= self._clock.now()]
        self._away = [(time, sent) for time, sent in self._away if time > self._clock.now()]
        for sent in due:
            self._send(sent, waiting)

    def _lost(
        self, sent: _Sent, identity: str, message: Message, waiting: dict[str, _Sent], late: bool
    ) -> bool:
        """Whether this is no answer, but news that the question was lost; it is then put again."""
        code = message.error.code if message.has_error() else None
        reason = None if message.has_error() else _reason(message)
        if code not in LOST and reason not in (*WORKER_AWAY, FORGOTTEN):
            return False
        if reason == FORGOTTEN and sent.address not in self._queries.values():
            self._known.discard(sent.address)
        if code == NODE_AWAY and sent.kind == QUERY:
            # Who is gone before it has said who it is, is met as a newcomer.
            return False
        if sent.attempts >= ATTEMPTS and (late or code == APP_KILLED):
            return False
        again = replace(sent, attempts=sent.attempts + 1)
        if late:
            del self._overdue[identity]
            self._send(again, self._overdue)
            return True
        del waiting[identity]
        if code == NODE_AWAY or reason is not None:
            self._away.append((self._clock.now() + AWAY_SECONDS, again))
        else:
            self._send(again, waiting)
        return True

    def _leave(self, gone: Collection[int], waiting: dict[str, _Sent]) -> None:
        """Wait for these nodes no longer, and hear nothing more of them."""
        for identity in [i for i, sent in waiting.items() if sent.node_id in gone]:
            del waiting[identity]
        self._overdue = {i: s for i, s in self._overdue.items() if s.node_id not in gone}
        self._away = [(time, sent) for time, sent in self._away if sent.node_id not in gone]

    def _look_for_newcomers(self, query: bytes) -> None:
        if self._clock.now() - self._looked < NEWCOMERS_SECONDS:
            return
        self._looked = self._clock.now()
        for node_id in self.nodes():
            if node_id not in self._known:
                self._known.add(node_id)
                sent = _Sent(node_id, 0, QUERY, query, LATE_GRACE_SECONDS, node_id)
                if identity := self._push(sent):
                    self._queries[identity] = node_id

    def _welcome(
        self,
        node_id: int,
        message: Message,
        newcomers: Newcomers | None,
        waiting: dict[str, _Sent],
    ) -> None:
        """Hear who a new node is. One that is back under another id gets its question at once."""
        reply = _read(message, node_id, 0, False, 0.0)
        if reply.payload is None or newcomers is None:
            # It may be asked again when it is looked for next.
            self._known.discard(node_id)
            return
        replaced = newcomers.joined(node_id, reply.payload)
        if replaced is None:
            return
        moved = [(i, sent) for i, sent in waiting.items() if sent.address == replaced]
        for identity, sent in moved:
            del waiting[identity]
            self._send(replace(sent, address=node_id), waiting)
        self._away = [
            (time, replace(sent, address=node_id) if sent.address == replaced else sent)
            for time, sent in self._away
        ]


def _read(message: Message, node_id: int, round_number: int, late: bool, waited: float) -> Reply:
    if message.has_error():
        error = message.error
        reason = f"node failed (Flower error {error.code}): {_first_line(error.reason)}"
        return Reply(node_id, round_number, None, reason, waited, late)
    record = message.content.get(RECORD)
    if not isinstance(record, ConfigRecord):
        return Reply(node_id, round_number, b"", "", waited, late)
    error_text, seconds = record.get("error"), record.get("seconds")
    taken = float(seconds) if isinstance(seconds, float) and seconds >= 0 else waited
    if isinstance(error_text, str) and error_text:
        return Reply(node_id, round_number, None, _first_line(error_text), taken, late)
    told = record.get("memory")
    sizes = [n for n in told if type(n) is int and n >= 0] if isinstance(told, list) else []
    return Reply(
        node_id,
        round_number,
        from_records(message.content) or b"",
        "",
        taken,
        late,
        dict(zip(MEMORY, sizes, strict=True)) if len(sizes) == len(MEMORY) else {},
    )


def _reason(message: Message) -> str | None:
    """The word for programs in a node's refusal."""
    record = message.content.get(RECORD)
    found = record.get("reason") if isinstance(record, ConfigRecord) else None
    return found if isinstance(found, str) else None


def _first_line(text: str | None) -> str:
    """A node's words, cut to one printable line: they end up in tables and in the ledger."""
    lines = (text or "").strip().splitlines() or ["no reason given"]
    return "".join(c for c in lines[0] if c.isprintable())[:300]
