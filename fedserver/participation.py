"""Which nodes a round asks: a share of those that train, by lot, the same lot in every replay."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from fedserver.configuration import RunConfiguration
from fedserver.roster import Member


def asked_in(
    configuration: RunConfiguration,
    members: Sequence[Member],
    round_number: int,
    busy: Collection[str] = (),
) -> list[Member]:
    """The members that get a message: those that only evaluate, and the chosen ones that train.

    Of an edge with those of its devices that do; the lot is the same whoever stands between.
    ``busy``: names of members that still work on an earlier round's plan, where that excludes them.
    """
    training = [n for m in members for n in m.names if _trains(configuration, n)]
    run = configuration.run_id()

    def lot(name: str) -> bytes:
        return hashlib.sha256(f"{run}|participation|{round_number}|{name}".encode()).digest()

    chosen = set(sorted(training, key=lot)[: configuration.participants(len(training))])
    asked = []
    for member in members:
        names = {n for n in member.names if n in chosen or not _trains(configuration, n)}
        if names and member.capabilities.node not in busy:
            asked.append(member.with_devices(names))
    return asked


def training(configuration: RunConfiguration, member: Member) -> int:
    """How many nodes train where this member is asked."""
    return sum(_trains(configuration, name) for name in member.names)


def _trains(configuration: RunConfiguration, name: str) -> bool:
    """Whether a node trains at all; one that the scenario does not name does."""
    node = configuration.node(name)
    return node is None or node.trains
