"""Recompression at the reference size stays lean and optimal, and the benchmark measures that."""

from __future__ import annotations

import pytest

from simulations.benchmarks.recompression import Case, compare, measure, table


def test_the_reference_stack_needs_little_memory_and_loses_nothing_to_the_optimum():
    case = Case()
    measurements = compare(case, ["qr", "gram"], repeats=1)
    assert table(case, measurements).row_count == 2
    for measurement in measurements:
        assert measurement.extra_bytes is None or measurement.extra_bytes <= 4 * case.stack_bytes
        assert measurement.error <= (1 + 1e-4) * measurement.optimum


@pytest.mark.parametrize("method", ["dense, float32", "dense, float64", "qr", "gram"])
def test_every_method_reaches_the_optimum_that_it_is_compared_with(method):
    measurement = measure(Case(size=64, ranks=(4, 4, 2), rank=3), method, repeats=1, threads=1)
    assert measurement.error == pytest.approx(measurement.optimum, rel=1e-4)
    assert measurement.optimum > 0
