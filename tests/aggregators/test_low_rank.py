"""A low-rank change is what its factors multiply to, whatever the factors are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aggregators import Dense, Layout, LowRank
from aggregators.low_rank import stack

Q = "model.layers.0.q_proj.weight"
UP = "model.layers.0.up_proj.weight"
SEEDS = st.integers(0, 2**32)
RANKS = st.integers(1, 12)  # above 6 the factors are wider than the matrices


@given(seed=SEEDS, rank=RANKS, scale=st.floats(-4, 4))
def test_dense_is_scale_times_b_times_a(low_rank, seed, rank, scale):
    update = low_rank(seed, rank, scale)
    for name, change in update.dense().items():
        factors = update.factors[name]
        torch.testing.assert_close(
            change, scale * (factors.B.double() @ factors.A.double()), rtol=1e-12, atol=1e-12
        )
        assert change.dtype == torch.float64
        assert update.rank(name) == rank
    assert update.rank("model.norm.weight") == 0


@given(seed=SEEDS, rank=RANKS)
def test_a_scale_for_each_component(low_rank, seed, rank):
    weights = torch.linspace(-1, 2, rank, dtype=torch.float64)
    update = low_rank(seed, rank, weights.tolist())
    factors = update.factors[Q]
    expected = sum(
        weights[i] * torch.outer(factors.B[:, i].double(), factors.A[i].double())
        for i in range(rank)
    )
    torch.testing.assert_close(update.dense()[Q], expected, rtol=1e-12, atol=1e-12)


@given(seed=SEEDS, rank=st.integers(1, 6))
def test_another_gauge_is_the_same_change(low_rank, layout, seed, rank):
    update = low_rank(seed, rank, dtype=torch.float64)
    other = low_rank(seed + 1, 3)
    generator = torch.Generator().manual_seed(seed)
    turned = {}
    for name, factors in update.factors.items():
        q = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        q = q + 4 * math.sqrt(rank) * torch.eye(rank, dtype=torch.float64)
        turned[name] = (factors.B @ q, torch.linalg.solve(q, factors.A), 2.0)
    same = LowRank(layout, turned)
    for name, change in update.dense().items():
        torch.testing.assert_close(same.dense()[name], change, rtol=1e-10, atol=1e-10)
    assert same.squared_norm() == pytest.approx(update.squared_norm(), rel=1e-9)
    assert same.inner(other) == pytest.approx(update.inner(other), rel=1e-9, abs=1e-9)


def test_a_norm_that_overflows_is_not_taken_for_zero(layout):
    # inf - inf: the change itself is infinite, and its Gram matrices are NaN.
    b = torch.zeros(6, 2, dtype=torch.float64)
    b[0] = 1e200
    a = torch.zeros(2, 6, dtype=torch.float64)
    a[0, 0], a[1, 0], a[1, 1] = 1.0, -1.0, 1.0
    assert not math.isfinite(LowRank(layout, {Q: (b, a, 1.0)}).squared_norm())


def test_a_change_minus_itself_has_no_norm(low_rank):
    update = low_rank(3, 4)
    nothing = update - update
    assert 0 <= nothing.squared_norm() <= 1e-12 * update.squared_norm()
    assert nothing.ranks == dict.fromkeys(update.factors, 8)


def test_sums_of_other_tensors_keep_both(low_rank, layout):
    one, two = low_rank(1, 2, names=(UP,)), low_rank(2, 3, names=(Q,))
    total = one + two
    assert list(total.factors) == [Q, UP]
    assert total.ranks == {Q: 3, UP: 2}
    assert one.inner(two) == 0.0


def test_a_stack_keeps_the_components_in_order(low_rank):
    updates = [low_rank(seed, rank) for seed, rank in ((1, 2), (2, 1), (3, 4))]
    total = stack(updates)
    assert torch.equal(total.factors[Q].B, torch.cat([u.factors[Q].B for u in updates], dim=1))
    assert torch.equal(total.factors[Q].A, torch.cat([u.factors[Q].A for u in updates]))


def test_equality_is_of_bits_types_and_layouts(low_rank, layout):
    update = low_rank(1, 2)
    assert update == low_rank(1, 2)
    assert update != low_rank(2, 2)
    assert update != low_rank(1, 2, dtype=torch.bfloat16)
    assert update != low_rank(1, 2, names=(Q,))
    elsewhere = Layout({Q: (6, 6)})
    factors = update.factors[Q]
    assert low_rank(1, 2, names=(Q,)) != LowRank(elsewhere, {Q: (factors.B, factors.A, 2.0)})
    assert update != "an update"


def test_families_and_layouts_do_not_mix(low_rank, layout):
    update = low_rank(1, 2)
    with pytest.raises(TypeError):
        update + Dense(layout, {})
    other = Layout({Q: (6, 6)})
    stranger = LowRank(other, {Q: (torch.ones(6, 1), torch.ones(1, 6), 1.0)})
    for combine in (update.__add__, update.inner, update.__sub__):
        with pytest.raises(ValueError, match="layout"):
            combine(stranger)
    with pytest.raises(ValueError, match="layout"):
        update.dense(other)


@pytest.mark.parametrize(
    ("name", "b", "a", "scale"),
    [
        ("nowhere", torch.ones(6, 2), torch.ones(2, 6), 1.0),
        ("model.norm.weight", torch.ones(6, 2), torch.ones(2, 6), 1.0),
        ("temperature", torch.ones(6, 2), torch.ones(2, 6), 1.0),
        (Q, torch.ones(6), torch.ones(2, 6), 1.0),
        (Q, torch.ones(5, 2), torch.ones(2, 6), 1.0),
        (Q, torch.ones(6, 2), torch.ones(2, 7), 1.0),
        (Q, torch.ones(6, 2), torch.ones(3, 6), 1.0),
        (Q, torch.ones(6, 0), torch.ones(0, 6), 1.0),
        (Q, torch.ones(6, 2).int(), torch.ones(2, 6), 1.0),
        (Q, torch.ones(6, 2), torch.ones(2, 6), torch.ones(3)),
        (Q, torch.ones(6, 2), torch.ones(2, 6), torch.ones(2, 1)),
    ],
)
def test_factors_that_fit_nowhere_are_refused_by_name(layout, name, b, a, scale):
    with pytest.raises(ValueError, match=name):
        LowRank(layout, {name: (b, a, scale)})
