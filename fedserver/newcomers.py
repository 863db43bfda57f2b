"""Nodes that come and go in the middle of a run: one that is new takes part from the next round on, one
that is back under another id of Flower's gets the question that it left open, one that was shut out is
waited for no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from fedserver.configuration import RunConfiguration
from fedserver.events import Listener, Notice
from fedserver.roster import Roster, known_as, query_of, read_member, taken


class Churn:
    """The roster as it is now."""

    def __init__(
        self,
        roster: Roster,
        configuration: RunConfiguration,
        notify: Listener,
        enrolled: Mapping[str, str] | None = None,
        known: Mapping[str, str] | None = None,
        revoked: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        """``enrolled``, ``known``: public keys by node, as of ``gather_roster``. ``revoked``: names of
        the nodes that are shut out now.
        """
        self.roster = roster
        self._revoked = revoked
        self._told_of: frozenset[str] = frozenset()
        self._configuration = configuration
        self._enrolled = enrolled
        self._known = dict(known or {})
        for member in roster.members:
            self._known |= member.keys
        self.query = query_of(configuration)
        self._notify = notify

    def joined(self, node_id: int, capabilities: bytes) -> int | None:
        """Take a node in, if it holds the run's base model; returns the id that it had before."""
        member, problem = read_member(node_id, capabilities)
        if member is not None:
            if not self.roster.shares_base(member.capabilities):
                problem = f"{member.capabilities.node!r} holds another base model than the run's"
            problem = problem or taken(member, self.roster.members)
            if problem:
                member = None
            else:
                member, problem = known_as(member, self._configuration, self._enrolled, self._known)
        if problem:
            self._notify(Notice("warning", f"a node cannot take part: {problem}"))
        if member is None:
            return None
        name = member.capabilities.node
        before = next((m for m in self.roster.members if m.capabilities.node == name), None)
        self.roster = self.roster.with_member(member)
        self._known |= member.keys
        how = "is back" if before is not None else "has joined and takes part from the next round"
        self._notify(Notice("info", f"node {name!r} {how}"))
        return before.node_id if before is not None else None

    def revoked(self) -> frozenset[str]:
        """The members that are shut out now; a line tells of each."""
        members = {member.capabilities.node for member in self.roster.members}
        found = frozenset(self._revoked()) & members
        for name in sorted(found - self._told_of):
            text = f"node {name!r} has been revoked: it is left out, and the others go on"
            self._notify(Notice("warning", text))
        self._told_of = found
        return found
