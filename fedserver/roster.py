"""Who takes part: nodes say what they can do, and must agree on the base model and its layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from aggregators import Layout
from aggregators.messages import Capabilities
from fedserver.configuration import ConfigurationError, RunConfiguration
from fedserver.events import Listener, Notice
from fedserver.exchange import QUERY, Exchange
from fedserver.planner import data_specification

CONNECT_SECONDS = 300.0
QUERY_SECONDS = 900.0
CONNECT_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Member:
    """A node of the run: Flower's id (new in every engine) and what it says of itself."""

    node_id: int
    capabilities: Capabilities


@dataclass(frozen=True)
class Roster:
    """The members, by name, and the base model that they agree on."""

    members: tuple[Member, ...]
    layout: Layout
    layout_json: str
    base_digest: str

    def shares_base(self, capabilities: Capabilities) -> bool:
        """Whether a node holds the base model of this roster."""
        own = (self.base_digest, self.layout_json)
        return (capabilities.base_digest, capabilities.layout_json) == own

    def with_member(self, member: Member) -> Roster:
        """The roster with one more node, or with another id for a node that it has."""
        kept = {m.capabilities.node: m for m in self.members} | {member.capabilities.node: member}
        return replace(self, members=tuple(kept[name] for name in sorted(kept)))


def query_of(configuration: RunConfiguration) -> bytes:
    """What a node is asked before it takes part."""
    return json.dumps(
        {
            "run": configuration.run_id(),
            "base_model": configuration.base_model,
            "dtype": configuration.base_dtype,
            "threads": configuration.threads,
            "names": [node.name for node in configuration.nodes],
            "data": data_specification(configuration),
        },
        sort_keys=True,
    ).encode()


def gather_roster(
    configuration: RunConfiguration,
    exchange: Exchange,
    notify: Listener,
    *,
    enrolled: Mapping[str, str] | None = None,
    known: Mapping[str, str] | None = None,
) -> Roster:
    """Wait for the nodes, ask what they can do, and keep those that share one base model.

    ``enrolled``: public keys by node; where it is given and signatures are required, others stay out.
    ``known``: the keys that nodes signed with so far. A node that either names keeps its key.
    """
    wanted = len(configuration.nodes)
    waited = 0.0
    while len(exchange.nodes()) < wanted and waited < CONNECT_SECONDS:
        exchange.wait(CONNECT_POLL_SECONDS)
        waited += CONNECT_POLL_SECONDS
    found = exchange.nodes()
    if len(found) < configuration.minimum_updates():
        raise ConfigurationError(
            f"{len(found)} of {wanted} nodes connected in {CONNECT_SECONDS:.0f} s; a round needs"
            f" {configuration.minimum_updates()}: start the missing nodes or lower 'quorum'"
        )
    members: dict[str, Member] = {}
    failures = []
    replies = exchange.ask(
        dict.fromkeys(found, query_of(configuration)),
        QUERY,
        0,
        QUERY_SECONDS,
        # A node that was restarted stays in Flower's list under its old id for a while.
        enough=lambda: len(members) == wanted,
        grace=0.0 if len(found) > wanted else None,
    )
    for reply in replies:
        problem = reply.error
        if reply.payload is not None:
            member, problem = read_member(reply.node_id, reply.payload)
            if member is not None:
                told = member.capabilities
                problem = stranger(told, configuration, enrolled, known or {})
                if told.node in members:
                    problem = f"the name {told.node!r} is already taken"
                elif not problem:
                    members[told.node] = member
        if problem:
            failures.append(problem)
    exchange.forget(before_round=1)
    if not members:
        raise ConfigurationError("no node can take part:\n  " + "\n  ".join(sorted(set(failures))))
    for problem, count in sorted(Counter(failures).items()):
        who = "a node" if count == 1 else f"{count} nodes"
        notify(Notice("warning", f"{who} cannot take part: {problem}"))
    roster = _agree(members, configuration, notify)
    if len(roster.members) < configuration.minimum_updates():
        raise ConfigurationError(
            f"{len(roster.members)} of {wanted} nodes can take part, a round needs"
            f" {configuration.minimum_updates()}: mend the others or lower 'quorum'"
            + "".join(f"\n  {problem}" for problem in sorted(set(failures)))
        )
    return roster


def stranger(
    told: Capabilities,
    configuration: RunConfiguration,
    enrolled: Mapping[str, str] | None,
    known: Mapping[str, str],
) -> str:
    """Why a node is not who it has to be; "" where nothing speaks against it."""
    expected = {**known, **(enrolled or {})}.get(told.node)
    required = configuration.signatures == "required"
    if required and enrolled is not None and told.node not in enrolled:
        return f"{told.node!r} is not enrolled"
    if required and told.public_key is None:
        return (
            f"{told.node!r} has no key, and the run requires signatures: start it with"
            " --node-config 'key=\"FILE\"'"
        )
    if expected is not None and told.public_key != expected:
        found = f"the key {told.public_key[:12]}" if told.public_key else "no key"
        return f"{told.node!r} has {found}, and is known by {expected[:12]}: enrol it again"
    return ""


def read_member(node_id: int, payload: bytes) -> tuple[Member | None, str]:
    """The member that a node's answer to the query makes it, or why it makes none."""
    try:
        return Member(node_id, Capabilities.from_bytes(payload)), ""
    except ValueError as error:
        return None, f"unreadable capabilities: {error}"


def _agree(members: dict[str, Member], configuration: RunConfiguration, notify: Listener) -> Roster:
    """The base model that most nodes hold (ties: the lowest digest); the others are left out."""
    votes = Counter(
        (m.capabilities.base_digest, m.capabilities.layout_json) for m in members.values()
    )
    (digest, layout_json), _ = min(votes.items(), key=lambda vote: (-vote[1], vote[0]))
    kept = []
    for name, member in sorted(members.items()):
        told = member.capabilities
        if (told.base_digest, told.layout_json) == (digest, layout_json):
            kept.append(member)
        else:
            notify(
                Notice(
                    "warning",
                    f"node {name!r} is left out: its base model {told.base_digest[:12]} is not"
                    f" the run's {digest[:12]} ({configuration.base_model})",
                )
            )
    return Roster(tuple(kept), Layout.from_json(layout_json), layout_json, digest)
