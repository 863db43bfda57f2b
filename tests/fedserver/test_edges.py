"""Edges of a scenario: what is refused, and that they decide no number."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

import pytest

from aggregators import Layout
from aggregators.messages import Capabilities, DeviceCapabilities
from fedserver.configuration import ConfigurationError, RunConfiguration, parse, to_toml
from fedserver.newcomers import Churn
from fedserver.participation import asked_in, training
from fedserver.roster import Member, Roster

NAMES = ("clinic", "school", "phone", "cafe", "ward")
EDGES = [{"name": "hospital", "nodes": ["clinic", "ward"]}, {"name": "campus", "nodes": ["school"]}]


def configuration(**changes: Any) -> RunConfiguration:
    nodes = [{"name": name, "trains": name != "cafe"} for name in NAMES]
    return parse({"nodes": nodes, "edges": EDGES} | changes)


def test_edges_are_no_part_of_a_run_s_identity() -> None:
    edged = configuration()
    assert edged.run_id() == configuration(edges=[]).run_id()
    assert parse(tomllib.loads(to_toml(edged))) == edged
    assert edged.answering() == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"edges": [{"name": "clinic", "nodes": ["school"]}]}, "used twice"),
        ({"edges": [*EDGES, {"name": "campus", "nodes": ["phone"]}]}, "used twice"),
        ({"edges": [{"name": "hospital", "nodes": ["nobody"]}]}, "no node 'nobody'"),
        ({"edges": [*EDGES, {"name": "town", "nodes": ["ward"]}]}, "behind an edge already"),
        ({"edges": [{"name": "hospital", "nodes": []}]}, "edges"),
        ({"preset": "fedit"}, "averages factors"),
        ({"asynchronous": True, "late": "discount"}, "asynchronous"),
    ],
)
def test_impossible_edges_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        configuration(**changes)


LAYOUT_JSON = Layout({"w": (4, 4)}).to_json()


def member(name: str, devices: Sequence[str] = ()) -> Member:
    told = {"examples": 3, "held_out": 1, "rank_limit": 8}
    behind = tuple(DeviceCapabilities(node=device, **told) for device in devices)
    capabilities = Capabilities(
        node=name, base_digest="b" * 64, layout_json=LAYOUT_JSON, threads=1, memory_bytes=0,
        device="cpu", versions={}, devices=behind, **told,
    )  # fmt: skip
    return Member(1, capabilities)


@pytest.mark.parametrize("number", range(1, 6))
def test_the_lot_is_the_same_whoever_stands_between(number: int) -> None:
    rules = configuration(participation=0.5)
    flat = asked_in(rules, [member(name) for name in NAMES], number)
    behind = ("clinic", "ward"), ("school",)
    edged = asked_in(
        rules,
        [member("hospital", behind[0]), member("campus", behind[1]), *map(member, NAMES[2:4])],
        number,
    )
    asked = [name for one in edged for name in one.names]
    assert sorted(asked) == sorted(one.capabilities.node for one in flat)
    assert "cafe" in asked
    assert sum(training(rules, one) for one in edged) == 2


@pytest.mark.parametrize(
    ("name", "devices", "clash"),
    [
        ("ward", (), "ward"),
        ("town", ("phone", "clinic"), "clinic"),
        ("town", ("cafe",), "cafe"),
        ("town", ("hospital",), "hospital"),
        ("hospital", ("clinic", "cafe"), "cafe"),
        ("town", ("phone", "phone"), "phone"),
        ("town", ("town",), "town"),
    ],
)
def test_a_newcomer_is_counted_once(name: str, devices: tuple[str, ...], clash: str) -> None:
    """Itself or through an edge, and not both."""
    members = (member("cafe"), member("hospital", ("clinic", "ward")))
    roster = Roster(members, Layout.from_json(LAYOUT_JSON), LAYOUT_JSON, "b" * 64)
    told: list[Any] = []
    churn = Churn(roster, configuration(), told.append)
    assert churn.joined(7, member(name, devices).capabilities.to_bytes()) is None
    assert churn.roster == roster
    assert f"the name {clash!r} is already taken" in told[0].text


@pytest.mark.parametrize(
    ("name", "devices"),
    [("cafe", ()), ("hospital", ("ward", "phone")), ("school", ()), ("campus", ("school",))],
)
def test_who_is_new_or_back_is_taken_in(name: str, devices: tuple[str, ...]) -> None:
    members = (member("cafe"), member("hospital", ("clinic", "ward")))
    roster = Roster(members, Layout.from_json(LAYOUT_JSON), LAYOUT_JSON, "b" * 64)
    churn = Churn(roster, configuration(), lambda event: None)
    replaced = churn.joined(7, member(name, devices).capabilities.to_bytes())
    assert replaced == (1 if name in ("cafe", "hospital") else None)
    assert [m.names for m in churn.roster.members if m.node_id == 7] == [devices or (name,)]
