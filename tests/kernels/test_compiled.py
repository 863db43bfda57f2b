"""The compiled module: the same bits as the reference, and no bad argument reaches its pointers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedkernels import _cpu
from fedkernels.reference import probes as reference

WORD = st.integers(0, 2**32 - 1)
SEED = st.integers(0, 2**64 - 1)


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_generator_equals_the_reference(counter, key):
    assert tuple(_cpu.philox4x32(counter, key)) == reference.philox4x32(counter, key)


@given(
    seed=SEED,
    tensor_id=SEED,
    first=st.integers(0, 2**64 - 1 - 300),
    count=st.integers(0, 300),
)
@example(seed=1, tensor_id=2, first=128 * 2**32 - 5, count=200)  # the block index outgrows a word
def test_any_stretch_of_a_probe_equals_its_definition(seed, tensor_id, first, count):
    out = torch.full((count,), torch.nan)
    _cpu.rademacher_(out, seed, tensor_id, first)
    assert out.tolist() == [element(seed, tensor_id, first + i) for i in range(count)]


def element(seed: int, tensor_id: int, index: int) -> float:
    """Return one element of a probe straight from the definition."""
    block = index // 128
    halves = [value >> shift & 0xFFFFFFFF for value in (block, tensor_id) for shift in (0, 32)]
    words = reference.philox4x32(tuple(halves), (seed & 0xFFFFFFFF, seed >> 32))
    return 1.0 - 2.0 * (words[index // 32 % 4] >> index % 32 & 1)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(3, 4).T,
        torch.zeros(8)[::2],
        torch.zeros(1).expand(4),
    ],
)
def test_what_is_not_contiguous_float32_is_refused_untouched(out):
    with pytest.raises(ValueError, match="out must be"):
        _cpu.rademacher_(out, 1, 2, 0)
    assert not out.any()


def test_a_stretch_beyond_the_last_element_is_refused():
    with pytest.raises(ValueError, match="first_element"):
        _cpu.rademacher_(torch.zeros(3), 1, 2, 2**64 - 2)
