"""The compiled module: the generator's bits, and no bad argument reaches its pointers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkernels import _cpu
from fedkernels.reference import probes as reference

WORD = st.integers(0, 2**32 - 1)
WHOLE = torch.tensor([[0, 0, 4]])


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_generator_equals_the_reference(counter, key):
    assert tuple(_cpu.philox4x32(counter, key)) == reference.philox4x32(counter, key)


def perturb(out, weight=None, pieces=WHOLE, gather=None, width=1, probe=0, isa=0):
    _cpu.perturb(out, weight, pieces, gather, width, 1, 2, probe, 1.0, isa, 1)


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
def test_what_is_not_contiguous_weights_is_refused_untouched(out):
    with pytest.raises(ValueError, match="out must be"):
        perturb(out)
    assert not out.any()


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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"weight": torch.zeros(5)}, "weight"),
        ({"weight": torch.zeros(4, dtype=torch.float16)}, "weight"),
        ({"pieces": torch.tensor([[0, 0, 5]])}, "pieces"),
        ({"pieces": torch.tensor([[1, 0, 4]])}, "pieces"),
        ({"pieces": torch.tensor([[-1, 0, 4]])}, "pieces"),
        ({"pieces": torch.tensor([[0, -1, 4]])}, "pieces"),
        ({"pieces": torch.tensor([[0, 2**62, 4]])}, "pieces"),
        ({"pieces": torch.tensor([[0, 0, -4]])}, "pieces"),
        ({"pieces": torch.tensor([0, 0, 4])}, "pieces"),
        ({"pieces": WHOLE.int()}, "pieces"),
        ({"gather": torch.tensor([0, 4])}, "pieces"),
        ({"gather": torch.tensor([1, 1])}, "gather"),
        ({"gather": torch.tensor([-1, 1])}, "gather"),
        ({"width": 0}, "width"),
        ({"probe": 4}, "probe"),
        ({"isa": 9}, "isa"),
    ],
)
def test_arguments_that_leave_the_weight_are_refused(arguments, named):
    out = torch.zeros(4)
    with pytest.raises(ValueError, match=named):
        perturb(out, **arguments)
    assert not out.any()


def test_replay_and_project_check_their_sizes():
    two, three = torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="coefficients"):
        _cpu.replay(torch.zeros(4), WHOLE, None, 1, two, three, 1.0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="seeds"):
        _cpu.replay(torch.zeros(4), WHOLE, None, 1, two[:0], three[:0], 1.0, 0, 0, 0, 1)
    out = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="out"):
        _cpu.project(out, torch.zeros(4), WHOLE, None, 1, two, 0, 0, 0, 1)
