"""Intervals agree with published tables of Student's t distribution."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedserver.intervals import estimate, t_quantile

TABLE_95 = {
    1: 12.7062,
    2: 4.3027,
    3: 3.1824,
    4: 2.7764,
    5: 2.5706,
    9: 2.2622,
    30: 2.0423,
    120: 1.9799,
}
TABLE_99 = {1: 63.6567, 2: 9.9248, 10: 3.1693}


@pytest.mark.parametrize(
    ("degrees", "confidence", "expected"),
    [(d, 0.95, t) for d, t in TABLE_95.items()] + [(d, 0.99, t) for d, t in TABLE_99.items()],
)
def test_quantiles_are_those_of_the_tables(
    degrees: int, confidence: float, expected: float
) -> None:
    assert t_quantile(degrees, confidence) == pytest.approx(expected, abs=6e-5)


def test_many_degrees_of_freedom_approach_the_normal_distribution() -> None:
    normal = statistics.NormalDist().inv_cdf(0.975)
    assert t_quantile(100_000) == pytest.approx(normal, abs=1e-4)


@pytest.mark.parametrize(("degrees", "confidence"), [(0, 0.95), (3, 0.0), (3, 1.0), (3, 1.5)])
def test_impossible_questions_are_refused(degrees: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        t_quantile(degrees, confidence)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.floats(-100, 100))
def test_intervals_move_with_their_values(values: list[float], shift: float) -> None:
    here, there = estimate(values), estimate([value + shift for value in values])
    assert here is not None
    assert there is not None
    assert there.mean == pytest.approx(here.mean + shift, abs=1e-6)
    assert there.half_width == pytest.approx(here.half_width, abs=1e-5)
    assert here.low <= here.mean <= here.high


def test_the_interval_of_three_values() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None
    assert found.half_width == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert estimate([]) is None
    single = estimate([2.0])
    assert single is not None
    assert (single.mean, single.half_width, single.low, single.high) == (2.0, None, 2.0, 2.0)
