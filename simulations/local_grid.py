"""An in-process implementation of Flower's Grid: the same ClientApp, no processes, no network.

Nodes are computed one after another when their replies are pulled, in the order of their ids, so a
run is deterministic and can be debugged with a breakpoint. Waiting costs no real time: it moves the
grid's own clock, so a node that never answers ends a round at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1
FIRST_NODE = 2
RAISED = 2  # Flower's error code for a ClientApp that raised an exception.

NodeConfig = dict[str, int | str]
Answer = Callable[[Message, Context], list["Delivery"]]


@dataclass(frozen=True)
class Delivery:
    """A reply and how many seconds of simulated time it takes to arrive."""

    reply: Message
    after: float = 0.0


@dataclass(frozen=True)
class LocalNode:
    """One simulated SuperNode: its Flower id, its configuration and its own state."""

    node_id: int
    answer: Answer
    context: Context


@dataclass
class SimulatedClock:
    """Seconds that pass only when somebody waits."""

    seconds: float = 0.0

    def now(self) -> float:
        """Simulated seconds since the start."""
        return self.seconds

    def wait(self, seconds: float) -> None:
        """Let simulated time pass at once."""
        self.seconds += seconds


@dataclass
class _Mailbox:
    asked: dict[str, Message] = field(default_factory=dict)
    arriving: list[tuple[float, int, Message]] = field(default_factory=list)
    round: int = 0


class LocalGrid(Grid):
    """Flower's Grid over nodes of this process."""

    def __init__(
        self,
        answers: Mapping[int, Answer],
        clock: SimulatedClock,
        *,
        on_start: Callable[[int, Message], None] | None = None,
        keys: Mapping[int, Path] | None = None,
    ) -> None:
        """``answers``: partition id -> what the node there does with a message. ``keys``: key files."""
        self._clock = clock
        self._on_start = on_start
        self._run = Run.create_empty(run_id=1)
        self._mail = _Mailbox()
        self._nodes = {
            FIRST_NODE + index: LocalNode(
                FIRST_NODE + index, answer, _context(index, len(answers), (keys or {}).get(index))
            )
            for index, answer in sorted(answers.items())
        }
        # Flower's messages take their sender from here; no other run lives in this process.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER_NODE, 1

    def set_run(self, run: Run) -> None:
        """Set the run that this grid belongs to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that this grid belongs to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message, as Flower's own grids do."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes are always connected."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; nothing is computed yet."""
        ids = []
        for message in messages:
            identity = str(uuid4())
            message.metadata.__dict__["_message_id"] = identity
            self._mail.asked[identity] = message
            self._mail.round = max(self._mail.round, _round_of(message))
            ids.append(identity)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the next node that was asked compute, and return the replies that have arrived."""
        wanted = set(message_ids)
        for identity in list(self._mail.asked):
            if identity in wanted:
                self._compute(self._mail.asked.pop(identity))
                break
        # What is too late for its round comes with the next: by order, not by the clock, so that a run
        # that is resumed hears it in the same round.
        arrived = [
            (time, number, reply)
            for time, number, reply in self._mail.arriving
            if (time <= self._clock.now() or number < self._mail.round)
            and reply.metadata.reply_to_message_id in wanted
        ]
        for item in arrived:
            self._mail.arriving.remove(item)
        return [reply for _, _, reply in arrived]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull until every message is answered or the simulated time is over."""
        waiting = set(self.push_messages(messages))
        start, replies = self._clock.now(), []
        while waiting and (timeout is None or self._clock.now() - start < timeout):
            pulled = list(self.pull_messages(waiting))
            replies += pulled
            waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
            if not pulled:
                self._clock.wait(1.0)
        return replies

    def _compute(self, message: Message) -> None:
        node = self._nodes[message.metadata.dst_node_id]
        if self._on_start is not None:
            self._on_start(node.node_id, message)
        now = self._clock.now()
        for delivery in node.answer(message, node.context):
            self._mail.arriving.append((now + delivery.after, _round_of(message), delivery.reply))


def _round_of(message: Message) -> int:
    group = message.metadata.group_id
    return int(group) if group.isdigit() else 0


def honest(app: ClientApp) -> Answer:
    """A node that does what it is asked. An exception becomes Flower's error reply."""

    def answer(message: Message, context: Context) -> list[Delivery]:
        try:
            return [Delivery(app(message, context))]
        except Exception as error:
            # Flower's own SuperNode reports any exception of a ClientApp in the same way.
            reason = f"{type(error).__name__}: {error}"
            return [Delivery(Message(Error(RAISED, reason), reply_to=message))]

    return answer


def _context(index: int, count: int, key: Path | None) -> Context:
    from flwr.app import UserConfig

    own = {} if key is None else {"key": str(key)}
    return Context(
        run_id=1,
        node_id=FIRST_NODE + index,
        node_config=UserConfig({"partition-id": index, "num-partitions": count, **own}),
        state=RecordDict(),
        run_config=UserConfig(),
    )
