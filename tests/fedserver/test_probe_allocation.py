"""Probes go where the last round's change was, and nodes may have probes of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import Layout, ProjectedGradient, aggregate
from aggregators.messages import Capabilities
from aggregators.probe_sum import ProbeSum
from fedserver.configuration import RunConfiguration, parse
from fedserver.global_model import GlobalModel, next_model
from fedserver.planner import make_plan
from fedserver.probe_allocation import measured_norms

LAYOUT = Layout({"a.weight": (24, 16), "b.weight": (12, 20), "norm.weight": (9,)})
NAMES = [spec.name for spec in LAYOUT]
NODES = ("x", "y", "z")


def configuration(**projected: Any) -> RunConfiguration:
    settings = {"coordinates": 400, **projected}
    nodes = [{"name": name} for name in NODES]
    return parse({"preset": "ferret", "rounds": 3, "nodes": nodes, "projected": settings})


def method_of(found: RunConfiguration, node: str, number: int, sums: Any = ()) -> Any:
    capabilities = Capabilities(
        node=node, examples=1, held_out=1, rank_limit=64, base_digest="0" * 64,
        layout_json=LAYOUT.to_json(), threads=1, memory_bytes=1, device="cpu", versions={},
    )  # fmt: skip
    return make_plan(
        found, capabilities, round_number=number, layout=LAYOUT, base_digest="0" * 64, sums=sums
    ).method


def change(seed: int, sizes: dict[str, float]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: sizes[n] * torch.randn(LAYOUT.shape(n), generator=generator) for n in NAMES}


def sent(found: RunConfiguration, number: int, sums: Any, changes: dict[str, Any]) -> Any:
    """Each node's projection in a round, with one example each."""
    updates = []
    for node, delta in changes.items():
        asked = method_of(found, node, number, sums)
        update = ProjectedGradient.of(
            LAYOUT, asked.master_seed, delta, asked.coordinates, asked.probe
        )
        updates.append((update, 1))
    return updates


@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3),
    scale=st.sampled_from(["mmse", "unbiased"]),
)
def test_norms_of_tensors_are_read_from_the_sum(seed: int, sizes: list[float], scale: str) -> None:
    delta = change(seed, dict(zip(NAMES, sizes, strict=True)))
    counts = dict.fromkeys(NAMES, 300)
    update = ProjectedGradient.of(LAYOUT, 5, delta, counts)
    held = ProbeSum.of_projection(update.shrunk() if scale == "mmse" else update)
    found = measured_norms([held], {5}, NAMES, scale)
    assert found is not None
    largest = max(float(tensor.norm()) for tensor in delta.values())
    for name, tensor in delta.items():
        expected = float(tensor.norm())
        # Coordinates are kept in steps of the largest: what is 1e-8 of it is only known to be small.
        assert found[name] == pytest.approx(expected, rel=0.25, abs=1e-6 * largest)
    assert measured_norms([held], {6}, NAMES, scale) is None


@pytest.mark.parametrize("seeds", ["shared", "per-node"])
@pytest.mark.parametrize("scale", ["mmse", "unbiased"])
def test_the_next_round_has_its_probes_where_the_last_had_its_change(
    seeds: str, scale: str
) -> None:
    found = configuration(seeds=seeds, scale=scale, error_feedback=scale == "mmse")
    first = method_of(found, "x", 1).coordinates
    roots = {n: math.sqrt(math.prod(LAYOUT.shape(n))) for n in NAMES}
    assert max(first, key=first.__getitem__) == max(roots, key=roots.__getitem__)
    sizes = {"a.weight": 0.0, "b.weight": 1.0, "norm.weight": 3.0}
    changes = {node: change(number, sizes) for number, node in enumerate(NODES)}
    model, _ = next_model(GlobalModel.empty(LAYOUT), sent(found, 1, (), changes), found)
    again = GlobalModel.from_bytes(model.to_bytes(), LAYOUT)
    following = method_of(found, "x", 2, again.sums).coordinates
    assert sum(following.values()) == 400
    assert following["a.weight"] == 1
    assert following["b.weight"] > first["b.weight"]
    assert all(method_of(found, n, 2, again.sums).coordinates == following for n in NODES)
    # A round without projections has the spread of the last one that had some.
    assert method_of(found, "x", 3, again.sums).coordinates == following
    by_size = configuration(seeds=seeds, allocation="sizes", scale="mmse")
    assert method_of(by_size, "x", 2, again.sums).coordinates == first


def test_seeds_are_everybodys_or_each_nodes_own_and_never_last_rounds() -> None:
    for seeds, expected in (("shared", 1), ("per-node", len(NODES))):
        found = configuration(seeds=seeds)
        rounds = [{method_of(found, n, t).master_seed for n in NODES} for t in (1, 2)]
        assert [len(each) for each in rounds] == [expected, expected]
        assert not rounds[0] & rounds[1]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), weights=st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_sums_over_probes_of_several_seeds_are_exact(seed: int, weights: list[int]) -> None:
    found = configuration(seeds="per-node", scale="unbiased", error_feedback=False, coordinates=60)
    sizes = dict.fromkeys(NAMES, 1.0)
    changes = {node: change(seed + number, sizes) for number, node in enumerate(NODES)}
    updates = [(u, w) for (u, _), w in zip(sent(found, 1, (), changes), weights, strict=True)]
    expected = {
        name: sum(u.dense()[name] * (w / sum(weights)) for u, w in updates) for name in NAMES
    }
    mixed = aggregate(updates, LAYOUT)
    assert mixed.shares == pytest.approx([w / sum(weights) for w in weights], rel=1e-12)
    backwards = aggregate(updates[::-1], LAYOUT)
    assert list(backwards.updates.values()) == list(mixed.updates.values())
    model, _ = next_model(GlobalModel.empty(LAYOUT), updates, found)
    held = [one.dense() for one in model.sums]
    assert len(held) == len(NODES)
    for name, tensor in expected.items():
        assert isinstance(tensor, torch.Tensor)
        torch.testing.assert_close(mixed.dense()[name], tensor, rtol=1e-9, atol=1e-9)
        total = sum(one[name] for one in held)
        assert isinstance(total, torch.Tensor)
        torch.testing.assert_close(total, tensor, rtol=1e-6, atol=1e-6)
