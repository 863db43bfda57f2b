"""Seeds and ids are whole numbers of any integer type; others are refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fedkernels as fk


def test_integers_of_other_libraries_are_integers():
    expected = fk.noise(7, 3, (4, 5))
    for number in (np.int64, np.uint32):
        assert torch.equal(fk.noise(number(7), number(3), (4, 5)), expected)


@pytest.mark.parametrize("arguments", [(1.5, 0), ("1", 0), (None, 0), (1, 2.0)])
def test_what_is_no_whole_number_is_refused(arguments):
    with pytest.raises(ValueError, match="whole number"):
        fk.noise(*arguments, (3,))
