"""Sums of sums: however a cohort is divided over edges, the aggregate has the same bits."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import (
    FactorScalars,
    Layout,
    LowRank,
    Pair,
    ProjectedGradient,
    SeedScalars,
    Sketch,
    Verdict,
    aggregate,
    encode,
)
from aggregators.codec import pack, unpack
from aggregators.cohort import Cohort, CohortMember
from aggregators.cohort_codec import cohort_parts, read_cohort
from aggregators.exact_numbers import DIGIT_BITS, LARGEST_TERM, LOWEST, ExactNumbers
from aggregators.shared_factors import factor_layout

LAYOUT = Layout({"embed": (5, 4), "first": (40, 36), "norm": (4,), "second": (36, 40)})
MASTER_SEED, POOL = 20, 64
BASIS = "b" * 64


def exact(numbers: ExactNumbers) -> list[Fraction]:
    places = [Fraction(2) ** (LOWEST + DIGIT_BITS * place) for place in range(len(numbers.digits))]
    return [
        sum((d * p for d, p in zip(digits, places, strict=True)), Fraction(0))
        for digits in numbers.digits.T.tolist()
    ]


@given(st.lists(st.floats(-LARGEST_TERM, LARGEST_TERM), min_size=1, max_size=20), st.data())
def test_sums_are_exact_in_any_grouping(terms: list[float], data: st.DataObject) -> None:
    singles = [ExactNumbers.of(torch.tensor([term], dtype=torch.float64)) for term in terms]
    for term, single in zip(terms, singles, strict=True):
        (found,) = exact(single)
        assert abs(found - Fraction(term)) < Fraction(2) ** LOWEST
        assert found == Fraction(term) or abs(term) < 2.0 ** (LOWEST + 53)
    total = sum((exact(single)[0] for single in singles), Fraction(0))
    while len(singles) > 1:
        one, two = data.draw(st.permutations(range(len(singles))))[:2]
        joint = singles[one] + singles[two]
        singles = [s for n, s in enumerate(singles) if n not in (one, two)] + [joint]
    assert exact(singles[0]) == [total]
    again = ExactNumbers.from_wire(*singles[0].wire())
    assert again == singles[0]
    assert float(again.float64()) == pytest.approx(float(total), rel=2**-50, abs=2.0**LOWEST)


def test_terms_beyond_what_fits_are_refused() -> None:
    for term in (float("nan"), float("inf"), 2 * LARGEST_TERM):
        with pytest.raises(ValueError, match="within"):
            ExactNumbers.of(torch.tensor([1.0, term], dtype=torch.float64))


def numbers(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def low_rank(seed: int) -> LowRank:
    rank = seed % 4 + 1
    factors = {
        "first": (numbers(seed, 40, rank).bfloat16(), numbers(seed + 1, rank, 36).float(), 0.3)
    }
    if seed % 2:
        factors["second"] = (
            numbers(seed + 2, 36, 1).float(),
            numbers(seed + 3, 1, 40).float(),
            2.0,
        )
    return LowRank(LAYOUT, factors)


def seed_scalars(seed: int) -> SeedScalars:
    indices = sorted({(seed * 7 + step * 11) % POOL for step in range(seed % 9 + 1)})
    return SeedScalars(LAYOUT, MASTER_SEED, POOL, indices, numbers(seed, len(indices)) * 1e-3)


def factor_scalars(seed: int) -> FactorScalars:
    own = factor_layout(LAYOUT, ["first"], 2)
    scalars = SeedScalars(own, MASTER_SEED, POOL, [seed % POOL], [1e-3 * (seed % 5 + 1)])
    return FactorScalars(LAYOUT, ["first"], 2, 2.0, 7, scalars)


def projected(seed: int) -> ProjectedGradient:
    counts = {"embed": 5, "first": 9} if seed % 2 else {"first": 9}
    return ProjectedGradient(
        LAYOUT, MASTER_SEED + seed % 2, {name: numbers(seed, k) for name, k in counts.items()}
    )


def sketch(seed: int) -> Sketch:
    views = {"first": (numbers(seed, 40, 2), numbers(seed + 1, 36, 3))}
    return Sketch(LAYOUT, BASIS, views, {"norm": numbers(seed + 2, 4)})


def pair(seed: int) -> Pair:
    return Pair([seed_scalars(seed), low_rank(seed + 1)])


UPDATES = st.builds(
    lambda make, seed: make(seed),
    st.sampled_from([low_rank, seed_scalars, factor_scalars, projected, sketch, pair]),
    st.integers(0, 10**6),
)


def sent(updates: list[tuple[Any, int]]) -> Cohort:
    """What an edge sums, as it comes out of its bytes."""
    members = [
        CohortMember(node=f"n{n}", verdict=Verdict.ACCEPTED, examples=weight, payload="a" * 64)
        for n, (_, weight) in enumerate(updates)
    ]
    return read_cohort(*unpack(pack(*cohort_parts(Cohort.of(updates, members)))), LAYOUT)


@settings(max_examples=25)
@given(
    cohort=st.lists(
        st.tuples(UPDATES, st.integers(1, 10**6), st.integers(0, 3)), min_size=1, max_size=6
    ),
    mixing=st.sampled_from(["add", "mean"]),
)
def test_edges_change_no_bit(cohort: list[tuple[Any, int, int]], mixing: Any) -> None:
    flat = aggregate([(update, weight) for update, weight, _ in cohort], LAYOUT, mixing)
    two_levels: list[tuple[Any, int]] = []
    for edge in range(4):
        behind = [(update, weight) for update, weight, where in cohort if where == edge]
        if edge == 0:
            two_levels += behind  # These answer the server itself.
        elif behind:
            two_levels.append((sent(behind), sum(weight for _, weight in behind)))
    found = aggregate(two_levels, LAYOUT, mixing)
    assert found.updates.keys() == flat.updates.keys()
    for key, update in found.updates.items():
        assert encode(update) == encode(flat.updates[key])
    assert sum(found.shares) == pytest.approx(sum(flat.shares))


def test_a_stack_longer_than_its_matrix_is_cut_and_stays_the_sum() -> None:
    updates = [(low_rank(4 * seed + 3), seed + 1) for seed in range(16)]
    flat = aggregate(updates, LAYOUT).updates["low_rank"]
    cohort = sent(updates)
    (mean,) = cohort.means
    assert isinstance(mean, LowRank)
    assert mean.ranks == {"first": 36, "second": 16}
    for name, change in mean.dense().items():
        torch.testing.assert_close(change, flat.dense()[name], rtol=1e-6, atol=1e-6)
