"""The carry is an exact sum; its head is the best of its rank, and its tail is what that leaves out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import Carry, Layout, LowRank
from aggregators.codec import pack, unpack

LAYOUT = Layout({"first": (30, 20), "norm": (4,), "second": (16, 24)})
SEEDS = st.integers(0, 2**32)
RANKS = st.lists(st.integers(1, 6), min_size=1, max_size=4)
LIMITS = st.none() | st.integers(0, 30)
ENERGIES = st.none() | st.floats(0.01, 1.0)
METHODS = pytest.mark.parametrize("method", ["auto", "qr", "gram"])


def change(seed, rank, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        LAYOUT,
        {
            name: (
                torch.randn(LAYOUT.shape(name)[0], rank, generator=generator),
                torch.randn(rank, LAYOUT.shape(name)[1], generator=generator),
                scale,
            )
            for name in ("first", "second")
        },
    )


def carried(seed, ranks):
    carry = Carry.empty(LAYOUT)
    for number, rank in enumerate(ranks):
        carry = carry.add(change(seed + number, rank, 1.0 / (1 + number)))
    return carry


def distance(one, two):
    names = one.keys() | two.keys()
    return math.hypot(
        *(float(torch.as_tensor(one.get(n, 0) - two.get(n, 0)).norm()) for n in names)
    )


def size(tensors):
    return distance(tensors, {})


@METHODS
@settings(max_examples=40)
@given(seed=SEEDS, ranks=RANKS)
def test_it_is_the_sum_of_what_was_added(method, seed, ranks):
    carry, total = Carry.empty(LAYOUT), {}
    for number, rank in enumerate(ranks):
        added = change(seed + number, rank)
        carry = carry.add(added, method)
        total = {name: total.get(name, 0) + part for name, part in added.dense().items()}
    assert distance(carry.dense(), total) <= 1e-6 * size(total)
    assert carry.rank <= sum(ranks)
    for part in carry.parts.values():
        assert bool((part.sigma.diff() <= 0).all())


@METHODS
def test_fifty_rounds_stay_at_the_float64_sum(method):
    carry, total = Carry.empty(LAYOUT), {}
    for number in range(50):
        added = change(number, 1 + number % 5, (-1.0) ** number / (1 + number % 7))
        carry = carry.add(added, method)
        total = {name: total.get(name, 0) + part for name, part in added.dense().items()}
    assert distance(carry.dense(), total) <= 1e-5 * size(total)
    assert carry.rank == 20


def test_adding_does_not_change_what_was(low_rank, layout):
    before = Carry.empty(layout).add(low_rank(1))
    digest = before.digest()
    after = before.add(low_rank(2))
    assert (before.digest(), before.rank, after.rank) == (digest, 2, 4)


def test_nothing_added_is_nothing_carried(low_rank, layout):
    empty = Carry.empty(layout)
    carry = empty.add(low_rank(1) * 0.0)
    assert (carry.rank, carry.parts, carry.tail_energy(2)) == (0, {}, 0.0)
    assert carry.digest() == empty.digest()
    assert carry.head(4).factors == {}
    update = low_rank(1)
    cancelled = empty.add(update).add(update * -1.0)
    assert size(cancelled.dense()) <= 1e-6 * size(update.dense())


@settings(max_examples=60)
@given(seed=SEEDS, ranks=RANKS, rank=LIMITS, energy=ENERGIES)
def test_head_and_tail_make_the_sum(seed, ranks, rank, energy):
    carry = carried(seed, ranks)
    head, tail = carry.head(rank, energy), carry.tail(rank, energy)
    whole = carry.dense()
    both = head.dense()
    for name, part in tail.dense().items():
        both[name] = both[name] + part if name in both else part
    assert distance(both, whole) <= 1e-6 * size(whole)
    for name, part in carry.parts.items():
        assert head.rank(name) + tail.rank(name) == len(part.sigma)
        assert rank is None or head.rank(name) <= rank


@settings(max_examples=60)
@given(seed=SEEDS, ranks=RANKS, rank=LIMITS)
def test_the_heads_error_is_that_of_the_best_approximation(seed, ranks, rank):
    carry = carried(seed, ranks)
    whole = carry.dense()
    # The oracle is the float64 singular value decomposition of the dense sum.
    cut = sum(
        float(torch.linalg.svdvals(part)[rank if rank is not None else len(part) :].square().sum())
        for part in whole.values()
    )
    sigmas = sum(float(p.sigma[len(p.sigma) if rank is None else rank :].square().sum())
                 for p in carry.parts.values())  # fmt: skip
    scale = size(whole)
    error = distance(carry.head(rank).dense(), whole)
    assert error == pytest.approx(math.sqrt(cut), rel=1e-5, abs=2e-6 * scale)
    assert error == pytest.approx(math.sqrt(sigmas), rel=1e-5, abs=2e-6 * scale)
    assert carry.tail_energy(rank) == pytest.approx(error / scale, rel=1e-5, abs=2e-6)


@settings(max_examples=60)
@given(seed=SEEDS, ranks=RANKS, energy=st.floats(0.01, 1.0))
def test_the_energy_rule_keeps_as_few_as_hold_it(seed, ranks, energy):
    carry = carried(seed, ranks)
    head = carry.head(energy=energy)
    for name, part in carry.parts.items():
        squares = part.sigma.square()
        kept, total = head.rank(name), float(squares.sum())
        assert float(squares[:kept].sum()) >= energy * total * (1 - 1e-12)
        assert float(squares[: kept - 1].sum()) < energy * total * (1 + 1e-12)
    assert carry.tail_energy(energy=energy) ** 2 <= 1 - energy + 1e-12
    # Both limits at once: the tighter one holds.
    both = carry.head(2, energy)
    assert both.ranks == {name: min(2, kept) for name, kept in head.ranks.items()}


def test_the_tail_competes_again():
    """A direction that is always below the cut of its round comes up when rounds repeat it."""
    basis = torch.eye(20)
    weak = LowRank(Layout({"w": (20, 20)}), {"w": (basis[:, :1], basis[:1], 1.0)})
    carry = Carry.empty(weak.layout)
    for number in range(1, 6):
        strong = (basis[:, number : number + 1], basis[number : number + 1], 3.0)
        carry = carry.add(weak + LowRank(weak.layout, {"w": strong}))
    assert carry.head(1).dense()["w"][0, 0] == pytest.approx(5.0, rel=1e-6)


def test_a_rank_limit_bounds_the_head_whatever_was_added():
    for rounds in (2, 12):
        assert set(carried(3, [2] * rounds).head(3).ranks.values()) == {3}


@settings(max_examples=40)
@given(seed=SEEDS, ranks=RANKS)
def test_bytes_round_trip(seed, ranks):
    carry = carried(seed, ranks)
    again = Carry.from_bytes(carry.to_bytes(), LAYOUT)
    assert again.to_bytes() == carry.to_bytes()
    assert again.digest() == carry.digest()
    assert list(again.parts) == list(carry.parts)
    for name, part in carry.parts.items():
        for one, two in zip(vars(part).values(), vars(again.parts[name]).values(), strict=True):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)
    # A restored run goes on with the same bits.
    following = change(seed + 99, 3)
    assert again.add(following).digest() == carry.add(following).digest()


def test_digests_tell_states_apart():
    digests = {carried(seed, [2]).digest() for seed in range(4)} | {Carry.empty(LAYOUT).digest()}
    assert len(digests) == 5


def test_other_layouts_and_other_bytes_are_refused(low_rank):
    carry = carried(1, [2])
    with pytest.raises(ValueError, match="layout"):
        carry.add(low_rank(1))
    with pytest.raises(ValueError, match="layout"):
        Carry.from_bytes(carry.to_bytes(), low_rank(1).layout)
    with pytest.raises(ValueError, match="not a carry"):
        Carry.from_bytes(carry.to_bytes()[:-1], LAYOUT)
    header, tensors = unpack(carry.to_bytes())
    tensors.pop("first#S")
    with pytest.raises(ValueError, match="first#S"):
        Carry.from_bytes(pack(header, tensors), LAYOUT)


@pytest.mark.parametrize(
    ("name", "u", "sigma", "vt"),
    [
        ("nowhere", (30, 2), (2,), (2, 20)),
        ("norm", (4, 2), (2,), (2, 4)),
        ("first", (29, 2), (2,), (2, 20)),
        ("first", (30, 2), (3,), (2, 20)),
        ("first", (30, 2), (2,), (2, 21)),
        ("first", (30, 0), (0,), (0, 20)),
    ],
)
def test_parts_that_are_no_decomposition_are_refused(name, u, sigma, vt):
    with pytest.raises(ValueError, match=name):
        Carry(LAYOUT, {name: (torch.ones(u), torch.ones(sigma).double(), torch.ones(vt))})


@pytest.mark.parametrize("limits", [{"rank": -1}, {"energy": 0.0}, {"energy": 1.5}])
def test_limits_out_of_range_are_refused(limits):
    carry = carried(1, [2])
    for cut in (carry.head, carry.tail, carry.tail_energy):
        with pytest.raises(ValueError, match=next(iter(limits))):
            cut(**limits)
