"""The laws of an update, one table of families driven through all of them.

A new family is one line in FAMILIES: a strategy that draws its updates on LAYOUT, and the definition
of its dense change, written out a second time without the room's own code. For sketches ``dense`` is
their coordinates, a space of their own: the laws hold there, and no other family has a place in it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedkernels as fk
from aggregators import (
    Dense,
    FactorScalars,
    Layout,
    LowRank,
    ProjectedGradient,
    SeedScalars,
    Sketch,
    Update,
    aggregate,
    decode,
    encode,
)
from aggregators.codec import WIRE_DTYPES

LAYOUT = Layout({"embed": (5, 4), "first": (7, 4), "norm": (4,), "second": (4, 7), "bias": ()})
MATRICES = [spec.name for spec in LAYOUT if len(spec.shape) == 2]
MASTER_SEED, POOL = 20, 64
COUNTS = {"embed": 5, "first": 9, "norm": 1, "bias": 2}
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
# Squares of smaller ones are 0 in float64, and with them the norm that errors are relative to.
COEFFICIENTS = st.floats(-10, 10).map(lambda value: value if abs(value) > 1e-100 else 0.0)
WEIGHTS = st.floats(1e-3, 1e4)
TOLERANCE = 1e-5  # relative to the oracle, in float64


@dataclass(frozen=True)
class Family:
    updates: st.SearchStrategy[Any]
    oracle: Callable[[Any], dict[str, torch.Tensor]]
    of_weights: bool = True  # whether dense() is a change of the weights
    of_one_pool: bool = False


def _random(draw, shape, dtype):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@st.composite
def low_rank_updates(draw):
    """Draw ranks, alphas, plain or rsLoRA scales, and types for some of the matrices."""
    factors = {}
    for name in draw(st.lists(st.sampled_from(MATRICES), unique=True, min_size=1)):
        rows, columns = LAYOUT.shape(name)
        rank, alpha, dtype = draw(st.integers(1, 9)), draw(st.floats(0.1, 64)), draw(DTYPES)
        scale = alpha / (math.sqrt(rank) if draw(st.booleans()) else rank)
        if draw(st.booleans()):
            scale = scale * _random(draw, (rank,), torch.float64)
        b, a = _random(draw, (rows, rank), dtype), _random(draw, (rank, columns), dtype)
        factors[name] = (b, a, scale)
    return LowRank(LAYOUT, factors)


@st.composite
def dense_updates(draw):
    names = draw(st.lists(st.sampled_from([s.name for s in LAYOUT]), unique=True, min_size=1))
    return Dense(LAYOUT, {n: _random(draw, LAYOUT.shape(n), draw(DTYPES)) for n in names})


def low_rank_oracle(update):
    return {
        name: torch.einsum("or,r,ri->oi", f.B.double(), f.scale, f.A.double())
        for name, f in update.factors.items()
    }


def dense_oracle(update):
    return {name: tensor.double() for name, tensor in update.tensors.items()}


@st.composite
def seed_scalars(draw):
    """Draw scalars for some seeds of one pool."""
    indices = sorted(draw(st.sets(st.integers(0, POOL - 1), max_size=6)))
    scalars = _random(draw, (len(indices),), torch.float64)
    return SeedScalars(LAYOUT, MASTER_SEED, POOL, indices, scalars)


def seed_scalars_oracle(update):
    chosen = zip(update.indices.tolist(), update.scalars.tolist(), strict=True)
    total = {}
    for index, scalar in chosen:
        for spec in LAYOUT:
            z = fk.noise(fk.derive_seed(MASTER_SEED, index), spec.tensor_id, spec.shape).double()
            total[spec.name] = total.get(spec.name, 0) + scalar * z
    return total


@st.composite
def projections(draw):
    """Draw coordinates for some tensors; the number of probes of each is public, so fixed."""
    names = draw(st.lists(st.sampled_from(sorted(COUNTS)), unique=True, min_size=1))
    drawn = {name: _random(draw, (COUNTS[name],), torch.float64) for name in names}
    return ProjectedGradient(LAYOUT, MASTER_SEED, drawn)


def projection_oracle(update):
    total = {}
    for name, values in update.coordinates.items():
        shape, tensor_id = LAYOUT.shape(name), LAYOUT.tensor_id(name)
        probes = [
            fk.noise(fk.derive_seed(MASTER_SEED, k), tensor_id, shape).double()
            for k in range(len(values))
        ]
        total[name] = sum(v * z for v, z in zip(values.tolist(), probes, strict=True)) / len(values)
    return total


FACTORS = ["embed", "second"]
RANK, SCALE, SHARED = 3, 1.75, 77


@st.composite
def factor_scalars(draw):
    """Draw scalars along probes of the B of two matrices, beside the A of one seed."""
    indices = sorted(draw(st.sets(st.integers(0, POOL - 1), max_size=6)))
    scalars = _random(draw, (len(indices),), torch.float64)
    own = Layout({name: (LAYOUT.shape(name)[0], RANK) for name in FACTORS})
    of_factors = SeedScalars(own, MASTER_SEED, POOL, indices, scalars)
    return FactorScalars(LAYOUT, FACTORS, RANK, SCALE, SHARED, of_factors)


def factor_scalars_oracle(update):
    total = {}
    chosen = zip(update.scalars.indices.tolist(), update.scalars.scalars.tolist(), strict=True)
    for index, scalar in chosen:
        for place, name in enumerate(FACTORS):
            rows, columns = LAYOUT.shape(name)
            z = fk.noise(fk.derive_seed(MASTER_SEED, index), place, (rows, RANK)).double()
            signs = fk.noise(SHARED, LAYOUT.tensor_id(name), (RANK, columns)).double()
            a = (signs.float() / math.sqrt(3 * columns)).double()
            total[name] = total.get(name, 0) + SCALE * scalar * z @ a
    return total


BASIS = hashlib.sha256(b"a basis").hexdigest()
WIDTHS = {"embed": (1, 2), "first": (2, 3), "second": (1, 1)}


@st.composite
def sketches(draw):
    """Draw views of some matrices in one basis, whose widths are public, and some whole tensors."""
    views = {}
    for name in draw(st.lists(st.sampled_from(sorted(WIDTHS)), unique=True)):
        (rows, columns), (p, r) = LAYOUT.shape(name), WIDTHS[name]
        dtype = draw(DTYPES)
        views[name] = (_random(draw, (rows, p), dtype), _random(draw, (columns, r), dtype))
    names = draw(st.lists(st.sampled_from(["norm", "bias"]), unique=True))
    whole = {name: _random(draw, LAYOUT.shape(name), draw(DTYPES)) for name in names}
    return Sketch(LAYOUT, BASIS, views, whole)


def sketch_oracle(update):
    total = {name: tensor.double() for name, tensor in update.whole.items()}
    for name, view in update.views.items():
        total |= {f"{name}#P": view.P.double(), f"{name}#R": view.R.double()}
    return total


FAMILIES = {
    "sketch": Family(sketches(), sketch_oracle, of_weights=False),
    "seed_scalars": Family(seed_scalars(), seed_scalars_oracle, of_one_pool=True),
    "factor_scalars": Family(factor_scalars(), factor_scalars_oracle, of_one_pool=True),
    "projected_gradient": Family(projections(), projection_oracle),
    "low_rank": Family(low_rank_updates(), low_rank_oracle),
    "dense": Family(dense_updates(), dense_oracle),
}


def combination(oracle, terms):
    """sum c_i * Delta_i in float64, and sum |c_i| ||Delta_i||: what rounding is relative to."""
    total, size = {}, 0.0
    for update, coefficient in terms:
        for name, change in oracle(update).items():
            total[name] = total.get(name, 0) + coefficient * change
            size += abs(coefficient) * float(change.norm())
    return total, size


def mean(oracle, cohort):
    """By tensor, the weighted mean of the changes of those that have it, and the size of all."""
    changes = [(oracle(update), weight) for update, weight in cohort]
    total, size = {}, 0.0
    for name in {name for change, _ in changes for name in change}:
        held = [(change[name], weight) for change, weight in changes if name in change]
        divisor = math.fsum(weight for _, weight in held)
        total[name] = sum(weight / divisor * change for change, weight in held)
        size += sum(weight / divisor * float(change.norm()) for change, weight in held)
    return total, size


def assert_change(found, expected, size):
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert found[name].dtype == torch.float64
        allowed = TOLERANCE * float(change.norm()) + 1e-12 * size
        assert float((found[name] - change).norm()) <= allowed


law = settings(max_examples=40)


@pytest.mark.parametrize("name", FAMILIES)
class TestLaws:
    @law
    @given(data=st.data())
    def test_it_is_an_update_of_its_family(self, name, data):
        update = data.draw(FAMILIES[name].updates)
        assert isinstance(update, Update)
        assert (update.family, update.layout) == (name, LAYOUT)

    @law
    @given(data=st.data())
    def test_dense_is_the_definition(self, name, data):
        family = FAMILIES[name]
        update = data.draw(family.updates)
        assert_change(update.dense(LAYOUT), *combination(family.oracle, [(update, 1.0)]))

    @law
    @given(data=st.data(), a=COEFFICIENTS, b=COEFFICIENTS)
    def test_linearity(self, name, data, a, b):
        family = FAMILIES[name]
        u, v = data.draw(family.updates), data.draw(family.updates)
        expected, size = combination(family.oracle, [(u, a), (v, b)])
        assert_change((u * a + v * b).dense(), expected, size)
        assert_change((a * u + b * v).dense(), expected, size)
        difference, size = combination(family.oracle, [(u, 1.0), (v, -1.0)])
        assert_change((u - v).dense(), difference, size)

    @law
    @given(data=st.data())
    def test_inner_product_is_that_of_the_dense_changes(self, name, data):
        family = FAMILIES[name]
        u = data.draw(family.updates)
        other = FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]
        v = data.draw(other.updates)
        if family.of_weights != other.of_weights:
            for one, two in ((u, v), (v, u)):
                with pytest.raises(ValueError, match="reconstruct"):
                    one.inner(two)
            return
        mine, theirs = family.oracle(u), other.oracle(v)
        expected = sum(float((mine[n] * theirs[n]).sum()) for n in mine.keys() & theirs.keys())
        size = math.sqrt(sum(float(x.square().sum()) for x in mine.values())) * math.sqrt(
            sum(float(x.square().sum()) for x in theirs.values())
        )
        assert u.inner(v) == pytest.approx(expected, rel=1e-9, abs=1e-11 * size + 1e-300)
        assert v.inner(u) == pytest.approx(u.inner(v), rel=1e-9, abs=1e-11 * size + 1e-300)

    @law
    @given(data=st.data(), a=COEFFICIENTS)
    def test_squared_norm(self, name, data, a):
        family = FAMILIES[name]
        u = data.draw(family.updates)
        expected = sum(float(change.square().sum()) for change in family.oracle(u).values())
        assert u.squared_norm() == pytest.approx(expected, rel=1e-8, abs=1e-12)
        assert (u * a).squared_norm() == pytest.approx(a * a * expected, rel=1e-8, abs=1e-12)

    @law
    @given(data=st.data())
    def test_decode_inverts_encode(self, name, data):
        update = data.draw(FAMILIES[name].updates)
        encoded = encode(update)
        again = decode(encoded, LAYOUT)
        assert again == update
        assert encode(again) == encoded

    @law
    @given(data=st.data(), dtype=st.sampled_from(sorted(WIRE_DTYPES)))
    def test_a_short_type_is_idempotent_on_the_wire(self, name, data, dtype):
        update = data.draw(FAMILIES[name].updates)
        once = decode(encode(update, dtype), LAYOUT)
        twice = decode(encode(once, dtype), LAYOUT)
        expected = once.dense()
        for tensor, change in twice.dense().items():
            torch.testing.assert_close(change, expected[tensor], rtol=1e-6, atol=1e-6)

    @law
    @given(data=st.data())
    def test_aggregate_is_the_weighted_mean(self, name, data):
        family = FAMILIES[name]
        cohort = data.draw(st.lists(st.tuples(family.updates, WEIGHTS), min_size=1, max_size=5))
        total = sum(weight for _, weight in cohort)
        if family.of_one_pool:
            # Whoever found nothing to change has measured all tensors as well.
            expected, size = combination(family.oracle, [(u, w / total) for u, w in cohort])
        else:
            expected, size = mean(family.oracle, cohort)
        found = aggregate(cohort, LAYOUT)
        assert_change(found.dense(LAYOUT), expected, size)
        assert found.shares == pytest.approx([weight / total for _, weight in cohort])

    @law
    @given(data=st.data())
    def test_the_order_of_arrival_does_not_change_a_bit(self, name, data):
        family = FAMILIES[name]
        cohort = data.draw(st.lists(st.tuples(family.updates, WEIGHTS), min_size=2, max_size=4))
        # Twins too: equal updates with other weights, equal weights with other updates.
        cohort += [(cohort[0][0], cohort[1][1]), (cohort[1][0], cohort[1][1])]
        expected = encode(aggregate(cohort, LAYOUT).updates[name])
        shuffled = data.draw(st.permutations(cohort))
        for order in (shuffled, cohort[::-1]):
            assert encode(aggregate(order, LAYOUT).updates[name]) == expected

    @law
    @given(data=st.data(), parts=st.lists(st.floats(0.1, 1), min_size=1, max_size=4))
    def test_splitting_a_node_changes_nothing(self, name, data, parts):
        """One node, or several with the same update that share its weight, or a sum of parts."""
        family = FAMILIES[name]
        (u, weight), *others = data.draw(
            st.lists(st.tuples(family.updates, WEIGHTS), min_size=1, max_size=3)
        )
        whole = aggregate([(u, weight), *others], LAYOUT).dense()
        split = [(u, weight * part / sum(parts)) for part in parts]
        pieces = u * (parts[0] / 2) + u * (1 - parts[0] / 2)
        _, size = combination(family.oracle, [(u, 1.0), *others])
        assert_change(aggregate([*split, *others], LAYOUT).dense(), whole, size)
        assert_change(aggregate([(pieces, weight), *others], LAYOUT).dense(), whole, size)

    @law
    @given(data=st.data())
    def test_another_layout_is_refused(self, name, data):
        update = data.draw(FAMILIES[name].updates)
        other = Layout({"embed": (5, 4)})
        with pytest.raises(ValueError, match="layout"):
            aggregate([(update, 1.0)], other)
        with pytest.raises(ValueError, match="layout"):
            update.dense(other)


@settings(max_examples=60)
@given(
    cohort=st.lists(
        st.tuples(st.sampled_from(sorted(FAMILIES)), WEIGHTS),
        min_size=1,
        max_size=6,
    ),
    mixing=st.sampled_from(["add", "mean"]),
    lambdas=st.dictionaries(st.sampled_from(sorted(FAMILIES)), st.floats(0.1, 4)),
    data=st.data(),
)
def test_a_mixed_cohort_follows_the_mixing_rule(cohort, mixing, lambdas, data):
    members = [(data.draw(FAMILIES[name].updates), weight) for name, weight in cohort]
    everyone = sum(weight for _, weight in members)
    expected, size = {}, 0.0
    for name, family in FAMILIES.items():
        mine = [(u, w) for u, w in members if u.family == name]
        factor = lambdas.get(name, 1.0)
        if mixing == "add" and not family.of_one_pool:
            change, part = mean(family.oracle, mine)
        else:
            divisor = sum(w for _, w in mine) if mixing == "add" else everyone
            change, part = combination(family.oracle, [(u, w / divisor) for u, w in mine])
        size += factor * part
        for tensor, value in change.items():
            expected[tensor] = expected.get(tensor, 0) + factor * value
    found = aggregate(members, LAYOUT, mixing, lambdas)
    assert_change(found.dense(), expected, size)
    again = aggregate(data.draw(st.permutations(members)), LAYOUT, mixing, lambdas)
    assert again.updates.keys() == found.updates.keys()
    assert all(encode(again.updates[n]) == encode(found.updates[n]) for n in found.updates)


def test_every_order_of_a_cohort_gives_one_result():
    generator = torch.Generator().manual_seed(9)
    cohort = []
    for rank, weight in ((1, 3.0), (4, 1.0), (2, 2.0), (2, 2.0)):
        b, a = torch.randn(7, rank, generator=generator), torch.randn(rank, 4, generator=generator)
        cohort.append((LowRank(LAYOUT, {"first": (b, a, 0.3)}), weight))
    results = {
        encode(aggregate(list(order), LAYOUT).updates["low_rank"])
        for order in itertools.permutations(cohort)
    }
    assert len(results) == 1
