"""Sums along probes are integers: order never matters, bytes come back, and a replay is the change."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedkernels as fk
from aggregators import Layout, LowRank, ProjectedGradient, SeedScalars, UpdateRejected
from aggregators.codec import pack, unpack
from aggregators.probe_sum import LARGEST_TOTAL, ProbeSum
from aggregators.view import View, read_view, view_parts

LAYOUT = Layout({"first": (5, 7), "second": (3, 2), "norm": (4,)})
PROBES = st.sampled_from(fk.PROBES)


def walk(seed: int, probe: str, size: float = 1e-3) -> SeedScalars:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(12, generator=generator)[:5].sort().values
    values = size * torch.randn(5, generator=generator, dtype=torch.float64)
    return SeedScalars(LAYOUT, 4, 12, indices, values, probe)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), probe=PROBES)
def test_a_sum_is_the_sum_of_the_changes_in_any_order(seed, probe):
    walks = [walk(seed + i, probe) for i in range(3)]
    sums = []
    for order in itertools.permutations(walks):
        total = ProbeSum.pool(LAYOUT, 4, 12, probe, -36)
        for one in order:
            total = total.add(one)
        sums.append(total)
    assert all(total == sums[0] for total in sums)
    expected = (walks[0] + walks[1] + walks[2]).dense()
    for name, change in sums[0].dense().items():
        # Every scalar was rounded to a multiple of 2**-36, three times at most.
        torch.testing.assert_close(change, expected[name], rtol=0, atol=12 * 6 * 3 * 2.0**-37)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 999), probe=PROBES, dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_a_replay_moves_the_weight_by_the_change(seed, probe, dtype):
    total = ProbeSum.pool(LAYOUT, 4, 12, probe, -30).add(walk(seed, probe, 0.1))
    for name, change in total.dense().items():
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(LAYOUT.shape(name), generator=generator).to(dtype)
        expected = weight.double() + change
        moved = total.replay_(name, weight.clone())
        torch.testing.assert_close(
            moved.double(), expected.to(dtype).double(), rtol=1e-5, atol=1e-6
        )


@settings(max_examples=40)
@given(data=st.data(), probe=PROBES, exponent=st.integers(-60, 60))
def test_bytes_come_back(data, probe, exponent):
    largest = data.draw(st.sampled_from([1, 127, 128, 32767, 32768, LARGEST_TOTAL]))
    totals = st.lists(st.integers(-largest, largest), min_size=1, max_size=9)
    vectors = [torch.tensor(data.draw(totals)) for _ in range(2)]
    places = {"first": 0, "norm": 1}
    if data.draw(st.booleans()):
        vectors, places = vectors[:1], {spec.name: 0 for spec in LAYOUT}
    one = ProbeSum(LAYOUT, 7, probe, exponent, vectors, places)
    header, tensors = view_parts(View(sums=(one,)), None)
    assert read_view(*unpack(pack(header, tensors)), LAYOUT) == View(sums=(one,))


def test_a_pool_of_4096_fits_the_way_down():
    generator = torch.Generator().manual_seed(0)
    totals = torch.randint(-LARGEST_TOTAL, LARGEST_TOTAL, (4096,), generator=generator)
    one = ProbeSum(LAYOUT, 7, "rank1", -40, [totals], {spec.name: 0 for spec in LAYOUT})
    assert len(pack(*view_parts(View(sums=(one,)), None))) <= 16_900


def test_totals_that_leave_32_bits_double_their_steps():
    total = ProbeSum.pool(LAYOUT, 4, 12, "rank1", -40)
    once = SeedScalars(LAYOUT, 4, 12, [2], [1.5 * 2.0**-10], "rank1")
    for _ in range(5):
        total = total.add(once)
    assert total.exponent == -38
    assert float(total.vectors[0][2]) * 2.0**total.exponent == 7.5 * 2.0**-10


def test_a_projection_keeps_30_bits_of_its_largest():
    coordinates = {"first": torch.tensor([3.0, -1e-9]), "norm": torch.tensor([1e-3])}
    update = ProjectedGradient(LAYOUT, 5, coordinates)
    total = ProbeSum.of_projection(update)
    for name, change in total.dense().items():
        torch.testing.assert_close(change, update.dense_tensor(name), rtol=0, atol=3.0 * 2.0**-29)


@pytest.mark.parametrize(
    "update",
    [
        SeedScalars(LAYOUT, 5, 12, [1], [1.0], "rank1"),
        SeedScalars(LAYOUT, 4, 13, [1], [1.0], "rank1"),
        SeedScalars(LAYOUT, 4, 12, [1], [1.0], "gaussian"),
        SeedScalars(LAYOUT, 4, 12, [1], [1e300], "rank1"),
    ],
)
def test_another_pool_does_not_add(update):
    with pytest.raises(ValueError, match=r"pool|exponent"):
        ProbeSum.pool(LAYOUT, 4, 12, "rank1", -40).add(update)


def test_a_view_moves_weights_by_all_its_parts():
    generator = torch.Generator().manual_seed(1)
    adapter = LowRank(LAYOUT, {"first": (torch.randn(5, 2), torch.randn(2, 7), 0.5)})
    sums = (
        ProbeSum.pool(LAYOUT, 4, 12, "rank1", -30).add(walk(1, "rank1")),
        ProbeSum.of_projection(ProjectedGradient(LAYOUT, 5, {"second": torch.ones(3)})),
    )
    view = View(adapter, sums)
    for spec in LAYOUT:
        weight = torch.randn(spec.shape, generator=generator)
        expected = weight.double()
        for part in (adapter, *sums):
            expected = expected + part.dense().get(spec.name, torch.zeros(()))
        torch.testing.assert_close(
            view.moved(spec.name, weight).double(), expected, rtol=0, atol=1e-6
        )
    assert View().moved("first", torch.ones(5, 7)).equal(torch.ones(5, 7))
    assert (
        View().digest() == View(sums=(ProbeSum.pool(LAYOUT, 4, 12, "rank1", -30),)).digest() == ""
    )
    assert view.digest() == view.as_sent(None).digest() != View(adapter).digest()


def test_unreadable_sums_are_refused():
    one = ProbeSum.pool(LAYOUT, 4, 12, "rank1", -30)
    header, tensors = one.parts("")
    for changes in ({"seed": "4"}, {"probe": "x"}, {"exponent": None}, {"sizes": [11]}):
        with pytest.raises(UpdateRejected):
            ProbeSum.from_parts(header | changes, tensors, "", LAYOUT)


@given(before=st.floats(1e-9, 1e3), scalar=st.floats(-1e15, 1e15).filter(lambda x: abs(x) > 1e-3))
def test_a_scalar_of_any_size_is_added_in_coarser_steps(before: float, scalar: float) -> None:
    """What the gate lets through never ends a run: the sum keeps 30 bits of the largest total."""
    total = ProbeSum.pool(LAYOUT, 5, 8, "rank1", -40)
    for value, index in ((before, 1), (scalar, 2)):
        total = total.add(
            SeedScalars(LAYOUT, 5, 8, [index], torch.tensor([value], dtype=torch.float64), "rank1")
        )
    found = total.vectors[0].double() * 2.0**total.exponent
    largest = max(before, abs(scalar))
    assert abs(float(found[1]) - before) <= largest * 2.0**-29
    assert abs(float(found[2]) - scalar) <= largest * 2.0**-29
