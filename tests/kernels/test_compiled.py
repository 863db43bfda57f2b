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


WORDS = torch.zeros(2, 64, dtype=torch.int32)  # of signs [40, 50]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"out": torch.zeros(3, 0)}, "out"),
        ({"out": torch.zeros(4, 50)}, "out must be"),
        ({"out": torch.zeros(3, 50).double()}, "out must be float32"),
        ({"x": torch.zeros(0, 40)}, "x must"),
        ({"x": torch.zeros(3, 40).half()}, "x must be float32"),
        ({"x": torch.zeros(40, 3).T}, "x must be contiguous"),
        ({"x": torch.zeros(3, 70)}, "words must be"),
        ({"words": WORDS.long()}, "words must be int32"),
        ({"words": WORDS[:, :50]}, "words must be contiguous"),
        ({"scale": torch.zeros(49)}, "scale"),
        ({"scale": torch.zeros(50).double()}, "scale"),
        ({"add": torch.zeros(3, 49)}, "add must be"),
        ({"add": torch.zeros(3, 50).bfloat16()}, "add must have"),
        ({"isa": 9}, "isa"),
    ],
)
def test_no_bad_argument_reaches_a_sign_product(changed, named):
    arguments = {
        "out": torch.zeros(3, 50),
        "x": torch.zeros(3, 40),
        "words": WORDS,
        "scale": None,
        "add": None,
        "coarse": False,
        "isa": 0,
        "threads": 2,
    }
    _cpu.sign_product_(**arguments)
    with pytest.raises(ValueError, match=named):
        _cpu.sign_product_(**(arguments | changed))


def test_no_bad_argument_reaches_the_packing_of_signs():
    with pytest.raises(ValueError, match="out must be"):
        _cpu.sign_transpose_(WORDS[:1], WORDS, 0, 1)
    seeds, left = torch.zeros(40, dtype=torch.int64), torch.zeros(2, 32, dtype=torch.int32)
    for sizes, named in (((33, 50), "left"), ((32, 70), "right"), ((0, 50), "shape")):
        with pytest.raises(ValueError, match=named):
            _cpu.sign_factors_(left, WORDS, seeds, 1, *sizes, 1)
