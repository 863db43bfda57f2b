"""Weights that count once what families changed alike: between adding and one mean."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aggregators import Dense, ProjectedGradient, SeedScalars, Sketch, gram, overlap_weights

UP, NORM = "model.layers.0.up_proj.weight", "model.norm.weight"
SEEDS = st.integers(0, 2**32)
SHARES = st.lists(st.floats(0.1, 10.0), min_size=2, max_size=4)
CLOSE = 1e-4  # of weights, which are whole multiples of 2^-16


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixed(changes, shares):
    """x and the weights of dense changes [F, d]."""
    weights = overlap_weights(changes @ changes.T, shares)
    return torch.tensor(weights, dtype=torch.float64) @ changes, weights


def distance(changes, shares, weights):
    """The sum that the weights are to make least, by its definition, as a share of what 0 has."""
    lengths = changes.norm(dim=1)
    along = changes @ (torch.as_tensor(weights, dtype=torch.float64) @ changes) / lengths
    trust = torch.tensor(shares, dtype=torch.float64)
    return float((trust * (along - lengths).square()).sum() / (trust * lengths.square()).sum())


@settings(max_examples=30)
@given(seed=SEEDS, scalars=st.lists(st.floats(-3, 3), min_size=1, max_size=5), probe=st.sampled_from(
    ["rank1", "rademacher", "gaussian"]))  # fmt: skip
def test_products_are_those_of_the_dense_changes(low_rank, layout, seed, scalars, probe):
    whole = Dense(layout, {NORM: random(seed, 6).float(), UP: random(seed + 1, 9, 6)})
    walk = SeedScalars(layout, seed, 64, range(len(scalars)), scalars, probe)
    part = SeedScalars(layout, seed, 64, range(len(scalars)), scalars, probe, [NORM, UP])
    seen = ProjectedGradient.of(layout, seed, {UP: random(seed + 2, 9, 6)}, {UP: 3}, probe)
    families = [[low_rank(seed, 3), whole], [walk], [seen], [low_rank(seed + 3), part], [whole]]
    found = gram(families, layout)
    sizes = {spec.name: math.prod(spec.shape) for spec in layout}
    flat = torch.zeros(len(families), sum(sizes.values()), dtype=torch.float64)
    for row, updates in zip(flat, families, strict=True):
        for update in updates:
            for name, change in update.dense().items():
                start = sum(
                    itertools.takewhile(bool, (sizes[n] if n != name else 0 for n in sizes))
                )
                row[start : start + sizes[name]] += change.flatten()
    torch.testing.assert_close(found, flat @ flat.T, rtol=1e-9, atol=1e-9)


def test_a_sketch_is_no_change(layout):
    with pytest.raises(TypeError, match="sketch"):
        gram([[Sketch(layout, "", {}, {NORM: torch.ones(6)})]], layout)


@given(seed=SEEDS, shares=SHARES)
def test_families_that_changed_unlike_things_add(seed, shares):
    directions, _ = torch.linalg.qr(random(seed, 9, len(shares)))
    changes = directions.T * (0.1 + random(seed + 1, len(shares), 1).abs())
    assert mixed(changes, shares)[1] == [1.0] * len(shares)


@given(seed=SEEDS, shares=SHARES)
def test_families_that_changed_one_thing_are_one_mean(seed, shares):
    """Whether longer, shorter or against each other: along one line there is but one compromise."""
    lengths = random(seed, len(shares), 1)
    changes = lengths.sign() * (0.1 + lengths.abs()) * random(seed + 1, 1, 7)
    trust = torch.tensor(shares, dtype=torch.float64)
    found, weights = mixed(changes, shares)
    assert weights == pytest.approx((trust / trust.sum()).tolist(), abs=CLOSE)
    torch.testing.assert_close(found, trust / trust.sum() @ changes, rtol=0, atol=CLOSE * 50)


@given(cosine=st.floats(0, 0.99), length=st.floats(1e-3, 1e3))
def test_two_equal_families_go_from_sum_to_mean(cosine, length):
    products = torch.tensor([[1.0, cosine], [cosine, 1.0]]) * length**2
    assert overlap_weights(products, [3.0, 3.0]) == pytest.approx([1 / (1 + cosine)] * 2, abs=CLOSE)


@given(seed=SEEDS, shares=SHARES, scale=st.floats(1e-6, 1e6), choices=st.data())
def test_neither_units_nor_order_matter(seed, shares, scale, choices):
    changes = random(seed, len(shares), 6)
    found, weights = mixed(changes, shares)
    _, scaled = mixed(changes * scale, shares)
    assert scaled == pytest.approx(weights, abs=CLOSE)
    order = choices.draw(st.permutations(range(len(shares))))
    turned, _ = mixed(changes[list(order)], [shares[i] for i in order])
    torch.testing.assert_close(turned, found, rtol=0, atol=CLOSE * 10)


@given(seed=SEEDS, shares=SHARES, others=SEEDS)
def test_no_other_weights_fit_better(seed, shares, others):
    changes = random(seed, len(shares), 3)  # of so few dimensions that they must overlap
    _, weights = mixed(changes, shares)
    assert all(0 <= weight <= 1 for weight in weights)
    reached = distance(changes, shares, weights)
    chance = torch.Generator().manual_seed(others)
    for _ in range(20):
        other = torch.rand(len(shares), dtype=torch.float64, generator=chance)
        assert reached <= distance(changes, shares, other) + CLOSE


@given(seed=SEEDS, shares=SHARES, part=st.floats(0.1, 0.9))
def test_a_family_in_two_parts_is_the_family(seed, shares, part):
    changes = random(seed, len(shares), 20)
    found, weights = mixed(changes, shares)
    assume(weights[0] < 1)  # of two copies each may have a weight of 1
    parts = [part * shares[0], (1 - part) * shares[0], *shares[1:]]
    split, _ = mixed(torch.cat([changes[:1], changes]), parts)
    torch.testing.assert_close(split, found, rtol=0, atol=CLOSE * 10)


def test_a_family_without_a_change_is_in_nobodys_way():
    products = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    assert overlap_weights(products, [1.0, 2.0]) == [1.0, 1.0]
    assert overlap_weights(torch.zeros(1, 1), [1.0]) == [1.0]


@pytest.mark.parametrize("shares", [[1.0], [1.0, 0.0], [1.0, math.nan]])
def test_shares_are_positive_and_one_a_family(shares):
    with pytest.raises(ValueError, match="shares"):
        overlap_weights(torch.eye(2), shares)
