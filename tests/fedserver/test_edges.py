"""Edges of a scenario: what is refused, and that they decide no number."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from aggregators.messages import Capabilities, DeviceCapabilities
from fedserver.configuration import ConfigurationError, RunConfiguration, parse, to_toml
from fedserver.participation import asked_in, training
from fedserver.roster import Member

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


def member(name: str, devices: tuple[str, ...] = ()) -> Member:
    told = {"examples": 3, "held_out": 1, "rank_limit": 8}
    behind = tuple(DeviceCapabilities(node=device, **told) for device in devices)
    capabilities = Capabilities(
        node=name, base_digest="b" * 64, layout_json="{}", threads=1, memory_bytes=0, device="cpu",
        versions={}, devices=behind, **told,
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
