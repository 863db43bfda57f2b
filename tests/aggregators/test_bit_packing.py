"""Numbers come back from their bits, whatever their width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aggregators.bit_packing import PIECE, pack_bits, unpack_bits, width_of

TOTAL = st.integers(-(2**31) + 1, 2**31 - 1)


@given(st.lists(TOTAL, max_size=50), st.integers(0, 31))
def test_round_trip(values: list[int], shift: int) -> None:
    numbers = torch.tensor([value >> shift for value in values], dtype=torch.int64)
    width = width_of(numbers)
    packed = pack_bits(numbers, width)
    assert len(packed) == -(-len(values) * width // 8)
    assert torch.equal(unpack_bits(packed, width, len(values)), numbers)


def test_pieces_follow_each_other() -> None:
    numbers = torch.arange(-PIECE, PIECE + 3)
    assert width_of(numbers) == 18
    assert torch.equal(unpack_bits(pack_bits(numbers, 18), 18, len(numbers)), numbers)


@pytest.mark.parametrize(
    ("values", "width"), [([0], 1), ([-1], 1), ([1], 2), ([-2], 2), ([127, -128], 8)]
)
def test_no_bit_too_many(values: list[int], width: int) -> None:
    assert width_of(torch.tensor(values)) == width


@pytest.mark.parametrize(
    ("packed", "width", "count"),
    [
        (torch.zeros(2, dtype=torch.uint8), 8, 3),
        (torch.zeros(3, dtype=torch.int8), 8, 3),
        (torch.zeros(3, dtype=torch.uint8), 0, 3),
        (torch.zeros(3, dtype=torch.uint8), 33, 3),
        (torch.zeros(3, dtype=torch.uint8), True, 24),
        (torch.zeros(0, dtype=torch.uint8), 8, -1),
        (torch.ones(2, dtype=torch.uint8), 3, 5),
    ],
)
def test_other_bytes_are_refused(packed: torch.Tensor, width: int, count: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        unpack_bits(packed, width, count)


def test_too_large_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match="33 bits"):
        width_of(torch.tensor([2**31]))
