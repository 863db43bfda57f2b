"""Where a round's model comes from, and under which names a node may have filed what it left out.

A residual belongs to one history: the model it was measured against and who took part until then. The
entry that a round's model came from (genesis, the round before, or a roll-back) names all of that, by
the hash chain. The digest of a state would not: a round without its quorum leaves the state as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aggregators.messages import MOST_HISTORY
from aggregators.methods import CohortMethod
from fedserver.entry import Entry
from fedserver.ledger import Ledger
from fedserver.model_line import ModelLine, rolled_back_to
from fedserver.outcome import Outcome


@dataclass
class _Asked:
    """A round in which a node was asked to train. ``origin``: the entry that its model came from."""

    round: int
    origin: str
    accepted: bool = False


class Lineage:
    """The entries that a run's rounds began with; what an operator rolled back is no part of it."""

    def __init__(self) -> None:
        self._height = 0
        self._origin = ""
        self._asked: dict[str, list[_Asked]] = {}
        self._line = ModelLine()

    @classmethod
    def before(cls, ledger: Ledger, number: int) -> Lineage:
        """As it was when round ``number`` began."""
        found = cls()
        for entry in ledger.entries():
            if entry.kind == "round" and entry.round >= number:
                break
            found.take_in(entry)
        return found

    def catch_up(self, ledger: Ledger) -> None:
        """Take in what was appended since."""
        for entry in ledger.entries(start=self._height):
            self.take_in(entry)

    def history(self, node: str) -> tuple[str, ...]:
        """The name of the round that is to begin, then those of the last rounds that asked the node."""
        earlier = [one.origin for one in reversed(self._standing(node))]
        return (self._origin, *earlier[: MOST_HISTORY - 1])

    def lost(self, outcome: Outcome) -> str | None:
        """What to say of a node that trained without what its last accepted message left out.

        To be asked before the outcome's own round is taken in. A node that was accepted only with
        nothing left out does not exist: rounding alone leaves something.
        """
        plan = outcome.plan
        if outcome.admitted is None or not plan.history or isinstance(plan.method, CohortMethod):
            return None
        names = plan.history[1:]
        accepted = [
            one
            for one in self._standing(outcome.plan.node)
            if one.accepted and one.round < outcome.plan.round
        ]
        if not accepted:
            return None
        found = outcome.admitted.report.residual
        newest = accepted[-1]
        known = names[: names.index(newest.origin) + 1] if newest.origin in names else names
        if found in known:
            return None
        return (
            f"{outcome.plan.node} no longer has what its message of round {newest.round} left out, and"
            " began without it; keep the device's cache folder between rounds, with room on its disk"
        )

    def take_in(self, entry: Entry) -> None:
        """Go on by one entry."""
        self._height = entry.height + 1
        if entry.kind == "genesis":
            self._origin = entry.hash
        elif entry.kind == "round":
            for row in entry.content["nodes"]:
                for node, action, accepted in _asked_by(row):
                    self._take_in(node, action, accepted, row["plan"]["round"], entry.round)
            self._origin = entry.hash
        elif rolled_back_to(entry) is not None:
            self._origin = entry.hash
        self._line.take_in(entry)

    def _standing(self, node: str) -> list[_Asked]:
        """The rounds that asked a node and that the model has come by."""
        return [one for one in self._asked.get(node, []) if one.round in self._line.rounds]

    def _take_in(self, node: str, action: str, accepted: bool, number: int, now: int) -> None:
        """What an entry of round ``now`` says of one node, asked in round ``number``."""
        asked = self._asked.setdefault(node, [])
        known = next((one for one in asked if one.round == number), None)
        if known is None and number == now and action == "train":
            known = _Asked(number, self._origin)
            asked.append(known)
        if known is not None and accepted:
            known.accepted = True


def _asked_by(row: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """The nodes that a row is of, an edge's one by one: name, what it was asked, whether it counted."""
    plan, accepted = row["plan"], row["verdict"] == "accepted"
    groups = plan["method"].get("groups")
    if groups is None:
        yield row["node"], plan["action"], accepted
        return
    counted = {one["node"] for one in row.get("members", ()) if one["verdict"] == "accepted"}
    for group in groups:
        for name, _, _ in group["members"]:
            yield name, group["action"], accepted and name in counted
