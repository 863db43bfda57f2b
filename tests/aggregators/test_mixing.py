"""Sums of updates: shares, errors, and the baseline that is not a sum."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aggregators import Dense, aggregate, average_factors, encode

Q = "model.layers.0.q_proj.weight"
NORM = "model.norm.weight"
COHORTS = st.lists(
    st.tuples(st.integers(0, 2**32), st.integers(1, 6), st.floats(0.1, 8), st.floats(0.5, 1e4)),
    min_size=1,
    max_size=5,
)  # seed, rank, scale, weight of each node


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@given(cohort=COHORTS)
def test_a_cohort_of_unlike_ranks_is_the_float64_sum(low_rank, layout, cohort):
    total = math.fsum(weight for *_, weight in cohort)
    updates = [(low_rank(seed, rank, scale), weight) for seed, rank, scale, weight in cohort]
    result = aggregate(updates, layout)
    for name in updates[0][0].factors:
        expected = sum(
            weight / total * scale * (factors.B.double() @ factors.A.double())
            for (update, weight), (_, _, scale, _) in zip(updates, cohort, strict=True)
            for factors in [update.factors[name]]
        )
        assert relative_error(result.dense()[name], expected) <= 1e-5
    assert result.updates["low_rank"].rank(Q) == sum(rank for _, rank, _, _ in cohort)
    assert sum(result.shares) == pytest.approx(1.0)


def test_shares_follow_the_input_not_the_order_of_summation(low_rank, layout):
    cohort = [(low_rank(seed), weight) for seed, weight in ((1, 1.0), (2, 6.0), (3, 3.0))]
    assert aggregate(cohort, layout).shares == pytest.approx([0.1, 0.6, 0.3])
    assert aggregate(cohort[::-1], layout).shares == pytest.approx([0.3, 0.6, 0.1])


def test_families_add_and_one_mean_dilutes(low_rank, layout):
    strong, weak = low_rank(1), Dense(layout, {NORM: torch.ones(6), Q: torch.ones(6, 6)})
    cohort = [(strong, 1.0), (weak, 3.0)]
    added = aggregate(cohort, layout)
    assert added.shares == [1.0, 1.0]
    torch.testing.assert_close(added.dense()[Q], strong.dense()[Q] + 1.0)
    diluted = aggregate(cohort, layout, "mean")
    assert diluted.shares == [0.25, 0.75]
    torch.testing.assert_close(diluted.dense()[Q], 0.25 * strong.dense()[Q] + 0.75)
    weighted = aggregate(cohort, layout, family_weights={"dense": 0.5})
    assert weighted.shares == [1.0, 0.5]
    torch.testing.assert_close(weighted.dense()[NORM], torch.full((6,), 0.5).double())


@given(cohort=COHORTS, choices=st.data())
def test_average_factors_has_the_same_bits_in_any_order(low_rank, cohort, choices):
    updates = [(low_rank(seed, rank, scale), weight) for seed, rank, scale, weight in cohort]
    shuffled = choices.draw(st.permutations(updates))
    assert encode(average_factors(shuffled, 6)) == encode(average_factors(updates, 6))


def test_average_factors_counts_a_missing_tensor_as_zeros(low_rank, layout):
    whole, part = low_rank(1, 2), low_rank(2, 2, names=(Q,))
    found = average_factors([(whole, 1.0), (part, 3.0)], 2)
    assert found.factors.keys() == whole.factors.keys()
    name = next(name for name in whole.factors if name != Q)
    torch.testing.assert_close(found.dense()[name], whole.dense()[name] / 16, rtol=1e-5, atol=1e-5)


def test_average_factors_refuses_what_it_cannot_average(low_rank):
    with pytest.raises(ValueError, match="no updates"):
        average_factors([], 2)
    with pytest.raises(ValueError, match="rank 3"):
        average_factors([(low_rank(1, 3), 1.0)], 2)
    with pytest.raises(ValueError, match="positive"):
        average_factors([(low_rank(1), 0.0)], 2)


def test_family_weights_name_families(low_rank, layout):
    aggregate([(low_rank(1), 1.0)], layout, family_weights={"dense": 0.5})
    with pytest.raises(ValueError, match="lowrank"):
        aggregate([(low_rank(1), 1.0)], layout, family_weights={"lowrank": 0.5})


def test_family_weights_are_finite(low_rank, layout):
    with pytest.raises(ValueError, match="finite"):
        aggregate([(low_rank(1), 1.0)], layout, family_weights={"low_rank": math.nan})


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_impossible_weights_are_refused(low_rank, layout, weight):
    with pytest.raises(ValueError, match="positive"):
        aggregate([(low_rank(1), 1.0), (low_rank(2), weight)], layout)


def test_nothing_and_unknown_rules_are_refused(low_rank, layout):
    with pytest.raises(ValueError, match="no updates"):
        aggregate([], layout)
    with pytest.raises(ValueError, match="median"):
        aggregate([(low_rank(1), 1.0)], layout, "median")


def test_a_lone_update_is_not_re_ordered(low_rank, layout):
    alone = aggregate([(low_rank(1), 3.0)], layout)
    assert encode(alone.updates["low_rank"]) == encode(low_rank(1))


@given(cohort=COHORTS)
def test_average_factors_is_the_padded_mean_of_b_and_of_a(low_rank, layout, cohort):
    total = math.fsum(weight for *_, weight in cohort)
    largest = max(rank for _, rank, _, _ in cohort) + 1
    updates = [(low_rank(seed, rank, scale), weight) for seed, rank, scale, weight in cohort]
    found = average_factors(updates, largest)
    assert set(found.ranks.values()) == {largest}
    for name in updates[0][0].factors:
        rows, columns = layout.shape(name)
        mean_b = torch.zeros(rows, largest, dtype=torch.float64)
        mean_a = torch.zeros(largest, columns, dtype=torch.float64)
        for (update, weight), (_, rank, scale, _) in zip(updates, cohort, strict=True):
            pad = largest - rank
            b, a = update.factors[name].B.double(), update.factors[name].A.double()
            mean_b += weight / total * torch.nn.functional.pad(scale * b, (0, pad))
            mean_a += weight / total * torch.nn.functional.pad(a, (0, 0, 0, pad))
        torch.testing.assert_close(found.factors[name].B, mean_b.float(), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(found.factors[name].A, mean_a.float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            found.dense()[name], mean_b @ mean_a, rtol=1e-5, atol=1e-5 * float(mean_b.norm())
        )


def test_average_factors_has_the_cross_terms_that_the_sum_has_not(low_rank, layout):
    cohort = [(low_rank(1), 1.0), (low_rank(2), 1.0)]
    averaged = average_factors(cohort, 2).dense()[Q]
    exact = aggregate(cohort, layout).dense()[Q]
    assert relative_error(averaged, exact) > 0.1
    alike = [(low_rank(1), 1.0), (low_rank(1), 5.0)]
    expected = low_rank(1).dense()[Q]
    assert relative_error(average_factors(alike, 2).dense()[Q], expected) <= 1e-5
    assert relative_error(aggregate(alike, layout).dense()[Q], expected) <= 1e-12
