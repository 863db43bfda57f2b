"""One vector for all families: coordinates are those of the dense change, linear, and free of gauge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedkernels as fk
from aggregators import Dense, Layout, LowRank, ProjectedGradient, SeedScalars, Sketch
from aggregators.coordinates import coordinates, vector

LAYOUT = Layout({"embed": (7, 5), "first": (9, 6), "norm": (6,), "second": (6, 9)})
MASTER_SEED, COUNT = 11, 13
SEEDS = [fk.derive_seed(MASTER_SEED, k) for k in range(COUNT)]
RANDOM = st.integers(0, 2**32)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(seed, rank=2):
    names = ["embed", "second"]
    return LowRank(
        LAYOUT,
        {
            n: (drawn(seed + i, LAYOUT.shape(n)[0], rank), drawn(seed + i + 9, rank, LAYOUT.shape(n)[1]),
                drawn(seed + 5, rank))
            for i, n in enumerate(names)
        },
    )  # fmt: skip


def scalars(seed, probe="rank1"):
    indices = sorted({seed % 20, 3 + seed % 7, 15})
    return SeedScalars(LAYOUT, MASTER_SEED, 32, indices, drawn(seed, len(indices)), probe)


def projection(seed, probe="rank1"):
    counts = {"embed": 5, "first": 20, "norm": 3}
    return ProjectedGradient(
        LAYOUT, MASTER_SEED, {n: drawn(seed, k) for n, k in counts.items()}, probe
    )


def dense(seed):
    return Dense(LAYOUT, {spec.name: drawn(seed, *spec.shape) for spec in LAYOUT})


FAMILIES = {
    "low rank": low_rank,
    "scalars": scalars,
    "scalars on dense probes": lambda seed: scalars(seed, "gaussian"),
    "projection": projection,
    "projection on dense probes": lambda seed: projection(seed, "rademacher"),
    "dense": dense,
}


@given(family=st.sampled_from(sorted(FAMILIES)), seed=RANDOM)
def test_coordinates_are_those_of_the_dense_change(family, seed):
    update = FAMILIES[family](seed)
    found, change = coordinates(update, MASTER_SEED, COUNT), update.dense()
    assert list(found) == sorted(change, key=LAYOUT.tensor_id)
    for name, tensor in change.items():
        expected = fk.project(tensor.float(), SEEDS, LAYOUT.tensor_id(name), "rank1")
        scale = float(tensor.norm()) * tensor.numel() ** 0.5
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6 * scale)
    total = vector(found)
    torch.testing.assert_close(total, sum(found.values()))


@given(
    one=st.sampled_from(sorted(FAMILIES)),
    two=st.sampled_from(sorted(FAMILIES)),
    seed=RANDOM,
    a=st.floats(-3, 3),
    b=st.floats(-3, 3),
)
def test_the_vector_of_a_sum_is_the_sum_of_vectors_whatever_the_families(one, two, seed, a, b):
    first, second = FAMILIES[one](seed) * a, FAMILIES[two](seed + 1) * b
    total = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in LAYOUT}
    for update in (first, second):
        for name, tensor in update.dense().items():
            total[name] += tensor
    expected = vector(coordinates(Dense(LAYOUT, total), MASTER_SEED, COUNT))
    parts = [
        vector(coordinates(FAMILIES[name](seed + i), MASTER_SEED, COUNT))
        for i, name in enumerate((one, two))
    ]
    torch.testing.assert_close(a * parts[0] + b * parts[1], expected, rtol=1e-5, atol=1e-4)


@given(seed=RANDOM)
def test_another_gauge_has_the_same_coordinates(seed):
    update = low_rank(seed, rank=3)
    turn = drawn(seed + 77, 3, 3) + 4 * torch.eye(3, dtype=torch.float64)
    turned = {
        name: (f.B * f.scale @ turn, torch.linalg.inv(turn) @ f.A, 1.0)
        for name, f in update.factors.items()
    }
    again = LowRank(LAYOUT, turned).project(SEEDS)
    for name, values in update.project(SEEDS).items():
        torch.testing.assert_close(again[name], values, rtol=1e-8, atol=1e-8)


@given(seed=RANDOM, first=st.integers(1, 20), second=st.integers(1, 20))
def test_weighed_by_their_counts_two_estimates_are_that_from_all_probes(seed, first, second):
    change = drawn(seed, *LAYOUT.shape("first"))
    seeds = [fk.derive_seed(MASTER_SEED, k) for k in range(first + second)]

    def estimate(some):
        values = fk.project(change.float(), some, LAYOUT.tensor_id("first"), "rank1")
        probes = [
            fk.noise(s, LAYOUT.tensor_id("first"), tuple(change.shape), "rank1") for s in some
        ]
        return sum(v * z.double() for v, z in zip(values.tolist(), probes, strict=True)) / len(some)

    parts = first * estimate(seeds[:first]) + second * estimate(seeds[first:])
    torch.testing.assert_close(parts / (first + second), estimate(seeds), rtol=1e-5, atol=1e-5)


def test_only_asked_tensors_and_no_sketches():
    assert list(coordinates(dense(1), MASTER_SEED, COUNT, {"norm", "first"})) == ["first", "norm"]
    nothing = SeedScalars(LAYOUT, MASTER_SEED, 32, [], [], "rank1")
    assert coordinates(nothing, MASTER_SEED, COUNT) == {}
    assert vector({}).shape == (0,)
    with pytest.raises(ValueError, match="reconstruct"):
        coordinates(Sketch(LAYOUT, "0" * 64, {}), MASTER_SEED, COUNT)
    with pytest.raises(ValueError, match="0 probes"):
        coordinates(dense(1), MASTER_SEED, 0)
