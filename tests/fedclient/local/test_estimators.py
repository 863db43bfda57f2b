"""Estimators against objectives whose slopes are known, and as optimisers of a quadratic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregators.methods import ZerothOrderMethod
from fedclient.local.estimators import ESTIMATORS, Estimator, Measured, Point, Step

SLOPES = {0: 3.0, 1: -0.5, 2: 0.25, 3: -8.0}


def method(estimator: str, **changes: Any) -> ZerothOrderMethod:
    given_ = {
        "master_seed": 1,
        "pool_size": 64,
        "probe": "rademacher",
        "epsilon": 1e-3,
        "clip": None,
    }
    return ZerothOrderMethod.model_validate(given_ | {"estimator": estimator} | changes)


def make(estimator: str, **changes: Any) -> Estimator:
    return ESTIMATORS[estimator](method(estimator, **changes))


def linear(points: Sequence[Point]) -> list[Measured]:
    """An objective with the slope SLOPES[k] along probe k, and a loss that is not the objective."""
    return [Measured(5.0 + SLOPES[k] * scale, 7.0) for k, scale in points]


def test_every_estimator_of_the_method_is_there() -> None:
    assert set(ESTIMATORS) == set(ZerothOrderMethod.model_fields["estimator"].annotation.__args__)


@pytest.mark.parametrize("estimator", ["spsa", "forward-gradient", "momentum", "conservative"])
@pytest.mark.parametrize("indices", [[0], [1, 3], [0, 1, 2, 3]])
def test_the_first_step_is_along_the_mean_slope(estimator: str, indices: list[int]) -> None:
    step = make(estimator)(linear, indices, 1e-6)
    assert step.slopes == pytest.approx({k: SLOPES[k] for k in indices}, rel=1e-6)
    expected = {k: SLOPES[k] / len(indices) for k in indices}
    assert step.coefficients == pytest.approx(expected, rel=1e-6)
    assert (step.loss, step.skipped) == (7.0, 0)


@pytest.mark.parametrize("estimator", ["spsa", "forward-gradient", "sign", "momentum", "adam"])
def test_a_slope_is_cut_to_the_clip_and_a_nan_is_skipped(estimator: str) -> None:
    def broken(points: Sequence[Point]) -> list[Measured]:
        values = linear(points)
        return [
            Measured(math.nan, math.inf) if k == 2 and scale else value
            for (k, scale), value in zip(points, values, strict=True)
        ]

    step = make(estimator, clip=1.0)(broken, [0, 1, 2, 3], 1e-6)
    assert step.slopes == pytest.approx({0: 1.0, 1: -0.5, 3: -1.0}, rel=1e-6)
    assert step.skipped == 1
    assert step.loss == 7.0
    assert set(step.coefficients) == {0, 1, 3}
    assert all(math.isfinite(value) for value in step.coefficients.values())


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_where_nothing_is_finite_nothing_moves(estimator: str) -> None:
    step = make(estimator)(lambda points: [Measured(math.inf, math.nan) for _ in points], [1, 2], 1)
    assert not any(step.coefficients.values())
    assert step.skipped == 2
    assert math.isnan(step.loss)


def test_a_sign_step_does_not_depend_on_the_size_of_the_slope() -> None:
    assert make("sign")(linear, [0, 1], 1.0).coefficients == {0: 0.5, 1: -0.5}


@given(scale=st.floats(1e-3, 1e3), offset=st.floats(-10, 10))
def test_a_step_over_the_spread_does_not_depend_on_units(scale: float, offset: float) -> None:
    def other(points: Sequence[Point]) -> list[Measured]:
        return [Measured(offset + scale * at.objective, at.loss) for at in linear(points)]

    one, two = (make("fzoo", epsilon=0.1)(m, [0, 1, 3], 1.0) for m in (linear, other))
    assert one.coefficients == pytest.approx(two.coefficients, rel=1e-4)
    rises = {k: 0.1 * SLOPES[k] for k in (0, 1, 3)}
    values = [0.0, *rises.values()]
    mean = sum(values) / 4
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 4)
    assert one.coefficients == pytest.approx(
        {k: r / spread / 3 for k, r in rises.items()}, rel=1e-6
    )


@given(slopes=st.lists(st.floats(-5, 5), min_size=1, max_size=30), decay=st.floats(0, 0.97))
def test_momentum_is_the_buffer_of_sgd(slopes: list[float], decay: float) -> None:
    """As amounts by probe, up to what has decayed to a thousandth."""
    estimator = make("momentum", momentum=decay)
    buffer: dict[int, float] = {}
    for place, slope in enumerate(slopes):
        k = place % 4
        step = estimator(lambda points, g=slope: [Measured(g * s, 0.0) for _, s in points], [k], 1)
        buffer = {key: decay * amount for key, amount in buffer.items()}
        buffer[k] = buffer.get(k, 0.0) + slope
        for key, amount in buffer.items():
            left_out = 1e-3 * 5 / (1 - decay) + 1e-6
            assert step.coefficients.get(key, 0.0) == pytest.approx(amount, abs=left_out)


@given(slopes=st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_adam_along_one_probe_is_adam_of_one_weight(slopes: list[float]) -> None:
    estimator = make("adam", momentum=0.5)
    first = second = 0.0
    for count, slope in enumerate(slopes, start=1):
        step = estimator(lambda points, g=slope: [Measured(g * s, 0.0) for _, s in points], [2], 1)
        first = 0.5 * first + 0.5 * slope
        second = 0.999 * second + 0.001 * slope**2
        expected = first / (1 - 0.5**count) / (math.sqrt(second / (1 - 0.999**count)) + 1e-8)
        assert step.coefficients.get(2, 0.0) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(("curvature", "kept"), [(0.0, 1.0), (1e4, 0.0)])
def test_a_conservative_step_is_not_taken_where_it_raises_the_objective(
    curvature: float, kept: float
) -> None:
    def valley(points: Sequence[Point]) -> list[Measured]:
        return [Measured(2.0 * s + curvature * s * s, 1.0) for _, s in points]

    asked: list[Point] = []

    def noted(points: Sequence[Point]) -> list[Measured]:
        asked.extend(points)
        return valley(points)

    step = make("conservative")(noted, [9], 0.1)
    assert step.coefficients[9] == pytest.approx(2.0 * kept)
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("estimator", "rate"),
    [
        ("spsa", 0.05), ("forward-gradient", 0.05), ("fzoo", 0.02), ("sign", 0.02),
        ("momentum", 0.01), ("adam", 0.02), ("conservative", 0.05),
    ],
)  # fmt: skip
def test_each_descends_a_quadratic(estimator: str, rate: float) -> None:
    """Of 8 coordinates that are the probes themselves; two are drawn a step."""
    place = {k: 1.0 + 0.1 * k for k in range(8)}

    def bowl(points: Sequence[Point]) -> list[Measured]:
        values = []
        for k, scale in points:
            at = {**place, k: place[k] + scale}
            values.append(Measured(sum(x * x for x in at.values()), 0.0))
        return values

    run: Callable[..., Step] = make(estimator)
    start = bowl([(0, 0.0)])[0].objective
    for count in range(400):
        for k, amount in run(bowl, [count % 8, (count + 3) % 8], rate).coefficients.items():
            place[k] -= rate * amount
    assert bowl([(0, 0.0)])[0].objective < 0.2 * start
