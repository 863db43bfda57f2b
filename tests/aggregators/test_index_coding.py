"""Coded indices come back, cost about their entropy, and any bytes are indices or refused."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregators.index_coding import decode_indices, encode_indices


@given(st.sets(st.integers(0, 2**24 - 1), max_size=80).map(sorted))
def test_round_trip(indices):
    assert decode_indices(encode_indices(indices), len(indices), 2**24) == indices


@pytest.mark.parametrize(("count", "pool"), [(200, 4096), (1, 4096), (1024, 4096), (60, 10**6)])
def test_a_random_subset_costs_about_its_entropy(count, pool):
    chance = random.Random(count)
    sizes = [len(encode_indices(sorted(chance.sample(range(pool), count)))) for _ in range(20)]
    entropy = math.log2(math.comb(pool, count)) / 8
    assert sum(sizes) / len(sizes) <= 1.04 * entropy + 2


@pytest.mark.parametrize("indices", [[3, 3], [5, 2], [-1]])
def test_what_does_not_ascend_is_refused(indices):
    with pytest.raises(ValueError, match="ascend"):
        encode_indices(indices)


@given(data=st.binary(max_size=40), count=st.integers(0, 50), end=st.integers(1, 5000))
def test_any_bytes_are_indices_or_refused(data, count, end):
    try:
        found = decode_indices(data, count, end)
    except ValueError:
        return
    assert len(found) == count
    assert found == sorted(set(found))
    assert all(0 <= index < end for index in found)


@given(st.sets(st.integers(0, 999), min_size=1).map(sorted))
def test_a_byte_too_many_or_too_few_is_refused(indices):
    coded = encode_indices(indices)
    for wrong in (coded + b"\xff", coded[:-1]):
        with pytest.raises(ValueError, match="coded indices"):
            decode_indices(wrong, len(indices), 1000)
