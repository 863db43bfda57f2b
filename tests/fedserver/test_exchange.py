"""Questions that are lost on the way are put again; nodes that come back get what they left open."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedserver.exchange import (
    APP_KILLED,
    ATTEMPTS,
    LOST,
    NODE_AWAY,
    RECORD,
    TRAIN,
    WORKER_AWAY,
    Exchange,
    Reply,
)
from simulations.local_grid import FIRST_NODE, Answer, Delivery, LocalGrid, SimulatedClock

DEADLINE = 600.0


def echo(message: Message) -> Message:
    payload = message.content[RECORD]["payload"]
    assert isinstance(payload, bytes)
    content = RecordDict({RECORD: ConfigRecord({"payload": b"re: " + payload})})
    return Message(content, reply_to=message)


def stumbling(stumbles: list[int | str]) -> Answer:
    """A node whose first answers are lost in the given ways."""
    left = list(stumbles)

    def answer(message: Message, context: Context) -> list[Delivery]:
        if not left:
            return [Delivery(echo(message))]
        how = left.pop(0)
        if isinstance(how, int):
            return [Delivery(Message(Error(how, "lost"), reply_to=message))]
        content = RecordDict({RECORD: ConfigRecord({"error": "away", "reason": how})})
        return [Delivery(Message(content, reply_to=message))]

    return answer


def collected(
    stumbles: list[list[int | str]], deadline: float = DEADLINE
) -> tuple[list[Reply], float]:
    clock = SimulatedClock()
    grid = LocalGrid({i: stumbling(one) for i, one in enumerate(stumbles)}, clock)
    payloads = {FIRST_NODE + i: str(i).encode() for i in range(len(stumbles))}
    return list(Exchange(grid, clock).ask(payloads, TRAIN, 1, deadline)), clock.now()


@given(
    st.lists(st.lists(st.sampled_from([*LOST, *WORKER_AWAY]), max_size=ATTEMPTS - 1), max_size=4)
)
def test_a_lost_question_is_answered_once(stumbles: list[list[int | str]]) -> None:
    replies, seconds = collected(stumbles)
    found = sorted((reply.node_id, reply.payload) for reply in replies)
    assert found == [(FIRST_NODE + i, f"re: {i}".encode()) for i in range(len(stumbles))]
    assert not any(reply.late or reply.error for reply in replies)
    # Who is only killed is asked again at once; who is away, after a while.
    assert (seconds == 0.0) == all(
        how not in (NODE_AWAY, *WORKER_AWAY) for one in stumbles for how in one
    )


def test_what_does_not_get_better_ends() -> None:
    replies, seconds = collected([[APP_KILLED] * 50, [2]])
    assert [(reply.payload, bool(reply.error)) for reply in replies] == [(None, True)] * 2
    assert seconds == 0.0
    replies, seconds = collected([[NODE_AWAY] * 10_000], deadline=60.0)
    assert replies == []
    assert seconds >= 60.0


class Coming(LocalGrid):
    """A grid in which the second node appears when the first has not answered for a while."""

    def __init__(self, answers: dict[int, Answer], clock: SimulatedClock) -> None:
        super().__init__(answers, clock)
        self.clock = clock

    def get_node_ids(self) -> Iterable[int]:
        first = [FIRST_NODE, FIRST_NODE + 1]
        return first if self.clock.now() < 10 else [FIRST_NODE + 1, FIRST_NODE + 2]


class Welcoming:
    query = b"who are you?"

    def __init__(self) -> None:
        self.heard: list[tuple[int, bytes]] = []

    def joined(self, node_id: int, capabilities: bytes) -> int | None:
        self.heard.append((node_id, capabilities))
        return FIRST_NODE


def test_a_node_that_is_back_under_another_id_gets_its_question() -> None:
    clock = SimulatedClock()
    kinds: list[str] = []

    def back(message: Message, context: Context) -> list[Delivery]:
        kinds.append(message.metadata.message_type)
        return [Delivery(echo(message))]

    silent: Answer = lambda message, context: []  # noqa: E731
    grid = Coming({0: silent, 1: stumbling([]), 2: back}, clock)
    welcoming = Welcoming()
    payloads = {FIRST_NODE: b"a", FIRST_NODE + 1: b"b"}
    replies = list(Exchange(grid, clock).ask(payloads, TRAIN, 1, DEADLINE, newcomers=welcoming))
    assert welcoming.heard == [(FIRST_NODE + 2, b"re: who are you?")]
    assert kinds == [MessageType.QUERY, TRAIN]
    assert {reply.node_id: reply.payload for reply in replies} == {
        FIRST_NODE: b"re: a",
        FIRST_NODE + 1: b"re: b",
    }
    assert clock.now() < DEADLINE


def test_late_answers_come_with_the_next_round_and_given_up_ones_never() -> None:
    clock = SimulatedClock()

    def late(message: Message, context: Context) -> list[Delivery]:
        return [Delivery(echo(message), 2 * DEADLINE)]

    for forgotten in (False, True):
        exchange = Exchange(LocalGrid({0: late, 1: stumbling([])}, clock), clock)
        assert list(exchange.ask({FIRST_NODE: b"1"}, TRAIN, 1, DEADLINE)) == []
        if forgotten:
            exchange.forget(before_round=2)
        replies = list(exchange.ask({FIRST_NODE + 1: b"2"}, TRAIN, 2, DEADLINE))
        heard = [(reply.round, reply.late, reply.payload) for reply in replies]
        assert ((1, True, b"re: 1") in heard) == (not forgotten)
        assert (2, False, b"re: 2") in heard
