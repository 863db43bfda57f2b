"""The interval of a median: it holds it as often as it says, and one outlier cannot move it far."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.benchmarks.paired_ratios import median_ratio, tail_rank

SECONDS = st.floats(0.01, 1e3, allow_nan=False)


@pytest.mark.parametrize("count", range(1, 15))
def test_the_interval_misses_the_median_in_at_most_one_sample_of_twenty(count: int) -> None:
    """Every way in which so many values can lie above or below the true median, each as likely."""
    rank = tail_rank(count)
    sides = list(itertools.product((False, True), repeat=count))

    def missed(at: int) -> int:
        # The whole interval lies on one side where fewer than `at` values lie on the other.
        return sum(sum(side) < at or count - sum(side) < at for side in sides)

    assert (rank > 0) == (count >= 6)
    assert missed(rank) <= len(sides) / 20 if rank else True
    assert missed(rank + 1) > len(sides) / 20


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=6, max_size=40), st.randoms())
def test_the_median_lies_inside_whatever_the_order(
    pairs: list[tuple[float, float]], random: object
) -> None:
    found = median_ratio(pairs)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.median <= found.high
    random.shuffle(pairs)  # type: ignore[attr-defined]
    assert median_ratio(pairs) == found
    slowed = [(first, second * 1.03) for first, second in pairs]
    assert median_ratio(slowed).median == pytest.approx(found.median * 1.03)
