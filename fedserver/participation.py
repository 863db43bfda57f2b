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

    ``busy``: names of members that still work on an earlier round's plan, where that excludes them.
    """
    training = [m for m in members if trains(configuration, m)]
    run = configuration.run_id()

    def lot(member: Member) -> bytes:
        text = f"{run}|participation|{round_number}|{member.capabilities.node}"
        return hashlib.sha256(text.encode()).digest()

    chosen = sorted(training, key=lot)[: configuration.participants(len(training))]
    names = {member.capabilities.node for member in chosen}
    return [
        member
        for member in members
        if member.capabilities.node not in busy
        and (member.capabilities.node in names or not trains(configuration, member))
    ]


def trains(configuration: RunConfiguration, member: Member) -> bool:
    """Whether a member trains at all; one that the scenario does not name does."""
    node = configuration.node(member.capabilities.node)
    return node is None or node.trains
