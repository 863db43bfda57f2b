"""The aggregate is the float64 sum of the dense changes, however the nodes' factors are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import Carry, Layout, LowRank, aggregate, decode, encode

# A Linear keeps its weight as [out, in], GPT-2's Conv1D as [in, out].
LINEAR, CONV1D = "q_proj.weight", "c_attn.weight"
LAYOUT = Layout({LINEAR: (12, 8), CONV1D: (8, 12)})
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Node:
    """What a node trains: peft's A [r, in] and B [out, r] from a seed, and how it writes them."""

    rank: int
    alpha: float
    rslora: bool
    weight: float
    seed: int
    turned: bool
    cut: int

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def trained(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        b = torch.randn(12, self.rank, generator=generator)
        return b, torch.randn(self.rank, 8, generator=generator)

    def updates(self) -> list[LowRank]:
        """The change in another gauge (BQ, Q^-1 A), as the parts of its components around a cut."""
        b, a = self.trained()
        if self.turned:
            generator = torch.Generator().manual_seed(self.seed + 1)
            q = torch.randn(self.rank, self.rank, generator=generator, dtype=torch.float64)
            q = 3.0 * torch.linalg.qr(q).Q
            b, a = b.double() @ q, torch.linalg.solve(q, a.double())
        parts = [slice(0, self.cut), slice(self.cut, None)]
        return [
            LowRank(
                LAYOUT,
                {
                    LINEAR: (b[:, part], a[part], self.scale),
                    CONV1D: (a[part].T, b[:, part].T, self.scale),
                },
            )
            for part in parts
            if b[:, part].shape[1]
        ]


NODES = st.builds(
    Node,
    rank=st.integers(1, 16),
    alpha=st.floats(0.5, 128),
    rslora=st.booleans(),
    weight=st.floats(1, 1e5),
    seed=st.integers(0, 2**31),
    turned=st.booleans(),
    cut=st.integers(0, 16),
)


def oracle(nodes):
    total = math.fsum(node.weight for node in nodes)
    change = torch.zeros(12, 8, dtype=torch.float64)
    for node in nodes:
        b, a = node.trained()
        change += node.weight / total * node.scale * (b.double() @ a.double())
    return {LINEAR: change, CONV1D: change.T}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert float((found[name] - change).norm()) <= TOLERANCE * float(change.norm())


@settings(max_examples=100)
@given(nodes=st.lists(NODES, min_size=1, max_size=6), choices=st.data())
def test_gauges_splits_and_orders_leave_the_sum_as_it_is(nodes, choices):
    order = choices.draw(st.permutations(nodes))
    # A node's parts add up to its change: as one update, on the wire or not.
    cohort = []
    for node in order:
        first, *rest = node.updates()
        whole = sum(rest, first)
        sent = decode(encode(whole), LAYOUT) if node.turned else whole
        cohort.append((sent, node.weight))
    assert_equal(aggregate(cohort, LAYOUT).dense(LAYOUT), oracle(nodes))


@settings(max_examples=50)
@given(nodes=st.lists(NODES, min_size=2, max_size=5))
def test_parts_that_come_apart_add_up(nodes):
    """Every part as an update of its own: the mean over parts, times the number of parts."""
    cohort = [(part, node.weight) for node in nodes for part in node.updates()]
    shares = math.fsum(weight for _, weight in cohort)
    total = math.fsum(node.weight for node in nodes)
    found = aggregate(cohort, LAYOUT).updates["low_rank"] * (shares / total)
    assert_equal(found.dense(), oracle(nodes))


@settings(max_examples=50)
@given(rounds=st.lists(st.lists(NODES, min_size=1, max_size=3), min_size=1, max_size=5))
def test_the_carry_of_all_rounds_is_the_sum_of_their_means(rounds):
    carry = Carry.empty(LAYOUT)
    expected, size = torch.zeros(12, 8, dtype=torch.float64), 0.0
    for nodes in rounds:
        cohort = [(sum(rest, first), node.weight) for node in nodes
                  for first, *rest in [node.updates()]]  # fmt: skip
        carry = carry.add(aggregate(cohort, LAYOUT).updates["low_rank"])
        expected = expected + oracle(nodes)[LINEAR]
        size += float(oracle(nodes)[LINEAR].norm())
    found = carry.dense()
    assert float((found[LINEAR] - expected).norm()) <= TOLERANCE * size
    assert float((found[CONV1D] - expected.T).norm()) <= TOLERANCE * size


@settings(max_examples=50)
@given(nodes=st.lists(NODES, min_size=2, max_size=4), choices=st.data())
def test_every_order_of_arrival_gives_the_same_state(nodes, choices):
    cohort = [(node.updates()[0], node.weight) for node in nodes]
    shuffled = choices.draw(st.permutations(cohort))
    states = {
        Carry.empty(LAYOUT).add(aggregate(order, LAYOUT).updates["low_rank"]).digest()
        for order in (cohort, shuffled, cohort[::-1])
    }
    assert len(states) == 1
