"""Flower's SuperLink behind the front door: ``python -m fedserver.deployment.superlink ARGUMENTS``.

The front door judges the time that a node has signed when a request's headers are there, before its
body. Flower judges it again when the body is there as well, five minutes later at most: 2.4 MB on a
link of 64 kbit/s, and a SuperNode that is refused ends. Behind the front door it may take a day.

A node that was killed counts as connected until its heartbeat is missed, a minute later, and Flower
does not let it back before. Its key says that it is the same node: here it is let back in seconds.

A message counts as delivered as soon as its row is claimed. A SuperLink that is killed before the answer
is out has lost it: nobody asks for it again, and the run waits until its deadline. Here a SuperLink that
starts hands out once more what no one has confirmed.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from flwr.app import Message
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.state.schema.linkstate_models import MessageIns
from flwr.superlink.routers.fleet import node_auth
from sqlalchemy import update

UPLOAD_SECONDS = 86400
# So long a node that is back is away for whoever waits for it: what it was asked before is lost, and
# a run that hears of its absence asks again. It looks several times a second.
AWAY_SECONDS = 2.0

Activation = Callable[[SqlLinkState, int, float], bool]
Storing = Callable[[SqlLinkState, Message], str | None]

# A question whose objects are still there was not confirmed by its node. A reply that the ServerApp has
# been given is deleted with its question.
UNCONFIRMED = """
    UPDATE message_ins SET delivered_at = '' WHERE delivered_at != ''
        AND message_id IN (SELECT object_id FROM objects)
        AND message_id NOT IN (SELECT reply_to_message_id FROM message_res)
"""
UNREAD = "UPDATE message_res SET delivered_at = '' WHERE delivered_at != ''"


def mend() -> None:
    """Mend this process's SuperLink, before it is started."""
    vars(node_auth)["TIMESTAMP_TOLERANCE"] = UPLOAD_SECONDS
    SqlLinkState.activate_node = readmission(SqlLinkState.activate_node)  # type: ignore[assignment, method-assign]
    SqlLinkState.store_message_res = answered(SqlLinkState.store_message_res)  # type: ignore[assignment, method-assign]


def readmission(flowers: Activation, seconds: float = AWAY_SECONDS) -> Activation:
    """Flower's activation, which first ends the connection that a killed node has left, and refuses.

    The node asks again (``fedclient.resident.fleet``), and is let in when ``seconds`` have passed.
    """
    ended: dict[int, float] = {}

    def activate(state: SqlLinkState, node_id: int, heartbeat_interval: float) -> bool:
        if time.monotonic() - ended.get(node_id, float("-inf")) < seconds:
            return False
        if flowers(state, node_id, heartbeat_interval):
            return True
        if state.deactivate_node(node_id):
            ended[node_id] = time.monotonic()
        return False

    return activate


def redeliver(database: Path) -> int:
    """Hand out again what a SuperLink that was killed has claimed and perhaps not sent.

    A node that had got its question after all gets it twice, and answers twice with the same bytes, of
    which the SuperLink keeps the first. Returns how many messages, questions and replies.
    """
    if not database.exists():
        return 0
    with closing(sqlite3.connect(database)) as connection, connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        if not {"message_ins", "message_res", "objects"} <= {name for (name,) in tables}:
            return 0
        return sum(connection.execute(change).rowcount for change in (UNCONFIRMED, UNREAD))


def answered(flowers: Storing) -> Storing:
    """Flower's storing of a reply, after which the question is not handed out again."""

    def store(state: SqlLinkState, message: Message) -> str | None:
        stored = flowers(state, message)
        if stored is not None:
            question = MessageIns.message_id == message.metadata.reply_to_message_id
            with state.session() as session:
                waiting = update(MessageIns).where(question, MessageIns.delivered_at == "")
                session.execute(waiting.values(delivered_at="answered"))
        return stored

    return store


if __name__ == "__main__":
    from flwr.superlink.cli.flower_superlink import flower_superlink

    mend()
    redeliver(Path(sys.argv[sys.argv.index("--database") + 1]))
    sys.argv[0] = "flower-superlink"
    flower_superlink()
