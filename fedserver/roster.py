"""Who takes part: nodes say what they can do, and must agree on the base model and its layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from aggregators import Layout
from aggregators.messages import Capabilities, DeviceCapabilities
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

    @property
    def names(self) -> tuple[str, ...]:
        """Of the nodes that answer through it: its devices', or its own."""
        devices = self.capabilities.devices
        return tuple(d.node for d in devices) if devices else (self.capabilities.node,)

    @property
    def keys(self) -> dict[str, str]:
        """The public keys, by name, of the node and its devices that have one."""
        told = self.capabilities
        found = {one.node: one.public_key for one in told.devices} | {told.node: told.public_key}
        return {name: key for name, key in found.items() if key}

    def with_devices(self, names: Collection[str]) -> Member:
        """The same with these of its devices alone, if it has devices."""
        told = self.capabilities
        if not told.devices:
            return self
        kept = tuple(device for device in told.devices if device.node in names)
        return replace(self, capabilities=told.model_copy(update={"devices": kept}))


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

    def without(self, names: Collection[str]) -> list[Member]:
        """The members but for these nodes, which may be edges or behind one."""
        kept = []
        for member in self.members:
            left = set(member.names) - set(names)
            if left and member.capabilities.node not in names:
                kept.append(member.with_devices(left))
        return kept


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
            "signatures": configuration.signatures,
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
    revoked: Callable[[], Collection[str]] = frozenset,
) -> Roster:
    """Wait for the nodes, ask what they can do, and keep those that share one base model.

    ``enrolled``: public keys by node; where it is given and signatures are required, others stay out.
    ``known``: the keys that nodes signed with so far. A node that either names keeps its key.
    ``revoked``: names of the nodes that are shut out now; they are not waited for.
    """
    shut_out = before = frozenset(revoked())
    waited = 0.0
    members: dict[str, Member] = {}
    failures: list[str] = []
    uninvited: set[int] = set()
    asked: set[int] = set()
    heard: set[int] = set()
    connected: set[int] = set()

    def register(node_id: int, capabilities: bytes) -> None:
        """Take a node in, or note why it cannot be."""
        heard.add(node_id)
        if problem := refusal(node_id, capabilities):
            failures.append(problem)

    def refusal(node_id: int, capabilities: bytes) -> str:
        """Take a node in; returns why it cannot be, "" if it is."""
        member, problem = read_member(node_id, capabilities)
        if member is None:
            return problem
        name = member.capabilities.node
        if not configuration.names(name):
            uninvited.add(node_id)
        found, problem = known_as(member, configuration, enrolled, known or {})
        if found is not None:
            twice = f"the name {name!r} is already taken" if name in members else ""
            twice = twice or taken(member, members.values())
            problem = twice or problem
            if not twice:
                members[name] = found
        return problem

    def wanted() -> int:
        return configuration.answering() - sum(configuration.names(name) for name in shut_out)

    def minimum() -> int:
        return configuration.minimum_updates(without=shut_out)

    def able() -> set[int]:
        return connected if configuration.newcomers else connected - uninvited

    def complete() -> bool:
        goal = max(wanted(), len(able())) if configuration.newcomers else wanted()
        return sum(name not in shut_out for name in members) >= goal

    def leaves() -> set[int]:
        """Who is away and was not heard, once somebody unheard was shut out: that may be it."""
        nonlocal shut_out
        shut_out = frozenset(revoked())
        unheard = shut_out - before - members.keys()
        return connected - heard - set(exchange.nodes()) if unheard else set()

    query = query_of(configuration)
    while True:
        # Who is not in the scenario takes no missing node's place.
        while len(set(exchange.nodes()) - uninvited) < wanted() and waited < CONNECT_SECONDS:
            exchange.wait(CONNECT_POLL_SECONDS)
            waited += CONNECT_POLL_SECONDS
            shut_out = frozenset(revoked())
        connected = set(exchange.nodes())
        # How many are behind an edge, it says itself.
        if len(able()) < (1 if configuration.edges else minimum()):
            raise ConfigurationError(
                f"{len(able())} of {wanted()} nodes connected in {CONNECT_SECONDS:.0f} s; a round"
                f" needs {minimum()}: start the missing nodes or lower 'quorum'" + _told(failures)
            )
        found = sorted(connected - asked)
        strangers = len(uninvited)
        replies = exchange.ask(
            dict.fromkeys(found, query),
            QUERY,
            0,
            QUERY_SECONDS,
            # A node that was restarted stays in Flower's list under its old id for a while, and its new
            # id may come later.
            enough=complete,
            grace=0.0,
            newcomers=_Arriving(query, register),
            leaves=leaves,
        )
        for reply in replies:
            if reply.payload is not None:
                register(reply.node_id, reply.payload)
            elif reply.error:
                failures.append(reply.error)
        asked |= connected | heard
        if len(uninvited) == strangers or waited >= CONNECT_SECONDS:
            break
    exchange.forget(before_round=1)
    members = {name: member for name, member in members.items() if name not in shut_out}
    if not members:
        raise ConfigurationError("no node can take part" + _told(failures))
    for problem, count in sorted(Counter(failures).items()):
        who = "a node" if count == 1 else f"{count} nodes"
        notify(Notice("warning", f"{who} cannot take part: {problem}"))
    roster = agree(members, configuration.base_model, notify)
    taking_part = sum(len(member.names) for member in roster.members)
    if taking_part < minimum():
        raise ConfigurationError(
            f"{taking_part} of {len(configuration.nodes)} nodes can take part, a round needs"
            f" {minimum()}: mend the others or lower 'quorum'" + _told(failures)
        )
    return roster


def _told(failures: Collection[str]) -> str:
    return ": " + "; ".join(sorted(set(failures))) if failures else ""


def taken(member: Member, others: Iterable[Member]) -> str:
    """Which of a member's names, its devices' too, another one has or it has twice, or whether another
    has its part of the data; "" where none.

    A member of its own name is itself, back again.
    """
    name = member.capabilities.node
    own = [name, *(device.node for device in member.capabilities.devices)]
    twice = {one for one, count in Counter(own).items() if count > 1}
    for other in others:
        if other.capabilities.node != name:
            twice |= {other.capabilities.node, *other.names} & set(own)
            if member.capabilities.part is not None and member.capabilities.part == (
                other.capabilities.part
            ):
                return (
                    f"{name!r} plays the owner of part {member.capabilities.part} of the data, which"
                    f" {other.capabilities.node!r} does: let it join with another --partition, or"
                    " --data"
                )
    return f"the name {min(twice)!r} is already taken" if twice else ""


def known_as(
    member: Member,
    configuration: RunConfiguration,
    enrolled: Mapping[str, str] | None,
    known: Mapping[str, str],
) -> tuple[Member | None, str]:
    """The member with those of its devices that are who they have to be; what speaks against others."""
    told = member.capabilities
    problem = stranger(told, configuration, enrolled, known)
    if problem or not told.devices:
        return (None if problem else member), problem
    problems = {one.node: stranger(one, configuration, enrolled, known) for one in told.devices}
    problem = "; ".join(filter(None, problems.values()))
    names = {name for name, against in problems.items() if not against}
    return (member.with_devices(names) if names else None), problem


def stranger(
    told: Capabilities | DeviceCapabilities,
    configuration: RunConfiguration,
    enrolled: Mapping[str, str] | None,
    known: Mapping[str, str],
) -> str:
    """Why a node is not who it has to be; "" where nothing speaks against it."""
    if not configuration.names(told.node):
        if not configuration.newcomers:
            return (
                f"{told.node!r} is not in the scenario: add it to its [[nodes]], or set"
                " newcomers = true"
            )
        if isinstance(told, Capabilities) and told.part is not None:
            return (
                f"{told.node!r} is not in the scenario, whose data are its nodes': it takes part with"
                " data of its own (client join --data FILE)"
            )
    expected = {**known, **(enrolled or {})}.get(told.node)
    required = configuration.signatures == "required"
    if required and enrolled is not None and told.node not in enrolled:
        return f"{told.node!r} is not enrolled"
    if required and told.public_key is None:
        return no_key(told.node)
    if expected is not None and told.public_key != expected:
        found = f"the key {told.public_key[:12]}" if told.public_key else "no key"
        return f"{told.node!r} has {found}, and is known by {expected[:12]}: enrol it again"
    return ""


def no_key(node: str) -> str:
    """Why a run that requires signatures leaves a node out."""
    return (
        f"{node!r} has no key, and the run requires signatures: start it with"
        " --node-config 'key=\"FILE\"'"
    )


class _Arriving:
    """Nodes that connect while the others are being asked."""

    def __init__(self, query: bytes, register: Callable[[int, bytes], None]) -> None:
        self.query = query
        self._register = register

    def joined(self, node_id: int, capabilities: bytes) -> int | None:
        """Hear what it says; it replaces none that has answered."""
        self._register(node_id, capabilities)
        return None


def read_member(node_id: int, payload: bytes) -> tuple[Member | None, str]:
    """The member that a node's answer to the query makes it, or why it makes none."""
    try:
        return Member(node_id, Capabilities.from_bytes(payload)), ""
    except ValueError as error:
        return None, f"unreadable capabilities: {error}"


def agree(members: Mapping[str, Member], base_model: str, notify: Listener) -> Roster:
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
                    f" the run's {digest[:12]} ({base_model})",
                )
            )
    return Roster(tuple(kept), Layout.from_json(layout_json), layout_json, digest)
