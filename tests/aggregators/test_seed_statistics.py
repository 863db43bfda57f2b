"""Statistics of seeds add exactly, travel small, and say how likely each seed is drawn."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aggregators import Layout, SeedScalars, UpdateRejected, Verdict, decode, encode
from aggregators.codec import pack, unpack
from aggregators.gate import GateContext, admit
from aggregators.methods import ZerothOrderMethod
from aggregators.seed_sampling import drawn_indices, probabilities
from aggregators.seed_statistics import STEPS, SeedStatistics

LAYOUT = Layout({"weight": (3, 4)})
POOL, BOUND = 24, 10.0
SLOPES = st.lists(st.floats(-BOUND, BOUND), max_size=4)
MEASURED = st.dictionaries(st.integers(0, POOL - 1), SLOPES, max_size=8)


def statistics(measured: dict[int, list[float]]) -> SeedStatistics:
    return SeedStatistics.of(BOUND, POOL, measured)


def update(measured: dict[int, list[float]]) -> SeedScalars:
    indices = sorted(measured)
    scalars = [0.5 + index for index in indices]
    return SeedScalars(LAYOUT, 3, POOL, indices, scalars, statistics=statistics(measured))


@given(one=MEASURED, two=MEASURED)
def test_the_statistics_of_two_nodes_are_those_of_one_that_measured_both(
    one: dict[int, list[float]], two: dict[int, list[float]]
) -> None:
    joint = {k: one.get(k, []) + two.get(k, []) for k in one.keys() | two.keys()}
    expected = statistics(joint)
    assert statistics(one) + statistics(two) == expected
    assert statistics(two) + statistics(one) == expected
    assert (update(one) + update(two)).statistics == expected
    for index, total, count in zip(expected.indices, expected.sums, expected.counts, strict=True):
        slopes = joint[int(index)]
        assert int(count) == len(slopes)
        exact = sum(map(abs, slopes)) / BOUND * STEPS
        assert abs(int(total) - exact) <= len(slopes)


@given(measured=MEASURED)
def test_means_come_back_from_the_wire(measured: dict[int, list[float]]) -> None:
    sent = update(measured)
    assert decode(encode(sent), LAYOUT) == sent
    received = decode(encode(sent, "int8"), LAYOUT)
    assert isinstance(received, SeedScalars)
    assert received.statistics is not None
    assert torch.equal(received.statistics.counts, sent.statistics.counts)
    means = [[abs(g) for g in found] for found in measured.values() if found]
    largest = max((sum(found) / len(found) for found in means), default=0.0)
    step = largest / 255 + 2 * BOUND / STEPS
    error = (received.statistics.sums - sent.statistics.sums).abs() * (BOUND / STEPS)
    assert bool((error <= step * sent.statistics.counts).all())


def test_a_measured_seed_costs_less_than_two_bytes() -> None:
    drawn = Counter(islice(drawn_indices(5, 4096), 200))
    indices = sorted(drawn)
    found = SeedStatistics.of(1000.0, 4096, {k: [3.0 + k / 7] * drawn[k] for k in indices})
    scalars = torch.linspace(-1, 1, len(indices)).double()
    plain = SeedScalars(LAYOUT, 1, 4096, indices, scalars, "rank1")
    measured = SeedScalars(LAYOUT, 1, 4096, indices, scalars, "rank1", statistics=found)
    assert len(encode(measured, "int8")) - len(encode(plain, "int8")) <= 2 * len(indices)


@given(measured=MEASURED)
def test_a_state_keeps_statistics_as_they_are(measured: dict[int, list[float]]) -> None:
    found = statistics(measured)
    assert SeedStatistics.from_parts(*unpack(pack(*found.parts()))) == found


@given(
    measured=st.dictionaries(
        st.integers(0, POOL - 1), st.lists(st.floats(-BOUND, BOUND), min_size=1)
    )
)
def test_probabilities_are_the_softmax_of_the_scaled_means(
    measured: dict[int, list[float]],
) -> None:
    """The paper's definition in plain floats; a seed without a measurement stands at the mean."""
    found = probabilities(statistics(measured).levels())
    means = {k: sum(map(abs, slopes)) / len(slopes) for k, slopes in measured.items()}
    if not means or max(means.values()) - min(means.values()) < 1e-3:
        return
    least, most = min(means.values()), max(means.values())
    middle = sum(means.values()) / len(means)
    shares = [math.exp((means.get(k, middle) - least) / (most - least)) for k in range(POOL)]
    expected = [share / sum(shares) for share in shares]
    assert found == pytest.approx(expected, rel=0.02)


def test_seeds_are_drawn_alike_before_anything_is_measured() -> None:
    for empty in (statistics({}), statistics({3: [2.0], 9: [-2.0]})):
        assert probabilities(empty.levels()) == [1 / POOL] * POOL


def test_frequencies_follow_the_probabilities() -> None:
    levels = bytes([0, 255, 128, 128, 30, 255, 0, 77])
    count = 20_000
    drawn = Counter(islice(drawn_indices(11, len(levels), levels), count))
    expected = [count * p for p in probabilities(levels)]
    squared = sum((drawn[k] - e) ** 2 / e for k, e in enumerate(expected))
    assert squared < 30  # chi-squared, 7 degrees, p < 1e-4
    uniform = sum((drawn[k] - count / 8) ** 2 / (count / 8) for k in range(8))
    assert uniform > 1000
    again = list(islice(drawn_indices(11, len(levels), levels), 50))
    assert again == list(islice(drawn_indices(11, len(levels), levels), 50))
    assert again != list(islice(drawn_indices(12, len(levels), levels), 50))


def test_levels_are_of_the_whole_pool() -> None:
    with pytest.raises(ValueError, match="levels for a pool"):
        next(drawn_indices(1, 5, bytes(4)))


@pytest.mark.parametrize(
    ("bound", "sums", "counts", "words"),
    [
        (0.0, [1], [1], "bound"),
        (math.inf, [1], [1], "bound"),
        (1.0, [STEPS + 1], [1], "exceeds the bound"),
        (1.0, [-1], [1], "below 0"),
        (1.0, [0], [-1], "counts"),
        (1.0, [1, 2], [1], "one length"),
    ],
)
def test_impossible_statistics(
    bound: float, sums: list[int], counts: list[int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        SeedStatistics(bound, POOL, [3], sums, counts)


METHOD = ZerothOrderMethod(
    master_seed=3,
    pool_size=POOL,
    probe="rademacher",
    epsilon=1e-3,
    clip=BOUND,
    sampling="magnitude",
)
PLAIN = METHOD.model_copy(update={"sampling": "uniform"})
ONCE = {4: [1.0], 9: [-3.0]}


@pytest.mark.parametrize(
    ("method", "measured", "bound", "verdict"),
    [
        (METHOD, ONCE, BOUND, None),
        (METHOD, None, BOUND, Verdict.MALFORMED),
        (PLAIN, ONCE, BOUND, Verdict.MALFORMED),
        (METHOD, ONCE, 9.0, Verdict.POOL),
        (METHOD, {4: [1.0, 2.0], 9: [-3.0]}, BOUND, Verdict.OVERFLOW),
    ],
)
def test_the_gate_takes_only_statistics_that_the_plan_asks_for(
    method, measured, bound, verdict, layout, make_plan, make_reply
):
    found = None if measured is None else SeedStatistics.of(bound, POOL, measured)
    sent = SeedScalars(layout, 3, POOL, sorted(ONCE), [1e-3, 2e-3], statistics=found)
    plan = make_plan(local_steps=2).model_copy(update={"method": method})
    reply = make_reply(sent, plan)
    if verdict is None:
        assert admit(reply, GateContext(layout, plan)).update == sent
        return
    with pytest.raises(UpdateRejected) as caught:
        admit(reply, GateContext(layout, plan))
    assert caught.value.verdict is verdict


@given(data=st.binary(max_size=40), width=st.sampled_from([1, 8]), largest=st.integers(-1, 2**21))
def test_damaged_statistics_are_a_verdict(data: bytes, width: int, largest: int) -> None:
    header, tensors = unpack(encode(update(ONCE)))
    header["statistics"] = [BOUND, width, largest]
    tensors["statistics"] = torch.tensor(list(data), dtype=torch.uint8)
    verdicts, found = [], None
    try:
        found = decode(pack(header, tensors), LAYOUT)
    except UpdateRejected as rejection:
        verdicts.append(rejection.verdict)
    if found is None:
        assert verdicts == [Verdict.MALFORMED]
        return
    assert isinstance(found, SeedScalars)
    assert found.statistics is not None
    assert bool((found.statistics.sums <= found.statistics.counts * STEPS).all())
