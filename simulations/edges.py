"""A simulated edge aggregator: devices of a grid of its own, and one node of the grid above."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Context, Message

from fedclient.app import make_app
from fededge.aggregator import EdgeAggregator
from fedserver.events import Listener
from fedserver.exchange import Exchange
from simulations.local_grid import Answer, Delivery, LocalGrid, SimulatedClock, honest


def edge_node(
    name: str,
    devices: Mapping[int, Answer],
    keys: Mapping[int, Path],
    started: Callable[[int, Message], None],
    notify: Listener,
) -> Answer:
    """What the edge answers to a message above. ``devices``: partition id -> the device there.

    It has a clock of its own: edges wait for their devices at the same time, not one after another.
    """
    clock = SimulatedClock()
    exchange = Exchange(LocalGrid(devices, clock, on_start=started, keys=keys), clock)
    app = honest(make_app(EdgeAggregator(name, exchange, len(devices), notify).answer))

    def answer(message: Message, context: Context) -> list[Delivery]:
        before = clock.now()
        replies = app(message, context)
        return [Delivery(one.reply, one.after + clock.now() - before) for one in replies]

    return answer
