"""Flower's SuperLink behind the front door: ``python -m fedserver.deployment.superlink ARGUMENTS``.

The front door judges the time that a node has signed when a request's headers are there, before its
body. Flower judges it again when the body is there as well, five minutes later at most: 2.4 MB on a
link of 64 kbit/s, and a SuperNode that is refused ends. Behind the front door it may take a day.

A node that was killed counts as connected until its heartbeat is missed, a minute later, and Flower
does not let it back before. Its key says that it is the same node: here it is let back in seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.superlink.routers.fleet import node_auth

UPLOAD_SECONDS = 86400
# So long a node that is back is away for whoever waits for it: what it was asked before is lost, and
# a run that hears of its absence asks again. It looks several times a second.
AWAY_SECONDS = 2.0

Activation = Callable[[SqlLinkState, int, float], bool]


def mend() -> None:
    """Mend this process's SuperLink, before it is started."""
    vars(node_auth)["TIMESTAMP_TOLERANCE"] = UPLOAD_SECONDS
    SqlLinkState.activate_node = readmission(SqlLinkState.activate_node)  # type: ignore[assignment, method-assign]


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


if __name__ == "__main__":
    from flwr.superlink.cli.flower_superlink import flower_superlink

    mend()
    sys.argv[0] = "flower-superlink"
    flower_superlink()
