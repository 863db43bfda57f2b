"""A dense change is a tensor of the layout's shape for each name; anything else is refused."""

from __future__ import annotations

import pytest
import torch

from aggregators import Dense, LowRank

Q, NORM, NUMBER = "model.layers.0.q_proj.weight", "model.norm.weight", "temperature"


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("nowhere", torch.ones(6), "no tensor 'nowhere'"),
        (NORM, torch.ones(5), "shape"),
        (NORM, torch.ones(6, 1), "shape"),
        (NUMBER, torch.ones(1), "shape"),
        (NORM, torch.ones(6, dtype=torch.int64), "floating"),
    ],
)
def test_what_is_no_change_of_the_layout_is_refused(layout, name, tensor, words):
    with pytest.raises(ValueError, match=words):
        Dense(layout, {name: tensor})


def test_short_types_are_scaled_and_added_in_float64(layout):
    """1 + 2^-9 is no bfloat16: a sum that rounded to it would be 1."""
    one = Dense(layout, {NORM: torch.ones(6, dtype=torch.bfloat16)})
    found = (one + one * 2.0**-9).tensors[NORM]
    assert torch.equal(found, torch.full((6,), 1 + 2.0**-9, dtype=torch.float64))


def test_tensors_of_either_side_are_in_the_sum(layout):
    sum_ = Dense(layout, {NORM: torch.ones(6)}) - Dense(layout, {NUMBER: torch.tensor(2.0)})
    assert {name: float(t.sum()) for name, t in sum_.tensors.items()} == {NORM: 6.0, NUMBER: -2.0}


def test_equality_is_of_values_types_and_names(layout):
    change = Dense(layout, {NORM: torch.ones(6)})
    assert change == Dense(layout, {NORM: torch.ones(6)})
    assert change != Dense(layout, {NORM: torch.ones(6, dtype=torch.float64)})
    assert change != Dense(layout, {NORM: torch.zeros(6)})
    assert change != Dense(layout, {})
    assert change != "change"


def test_families_do_not_add_to_one_another(layout, low_rank):
    dense = Dense(layout, {Q: torch.ones(6, 6)})
    with pytest.raises(TypeError):
        dense + low_rank(1)
    with pytest.raises(TypeError):
        low_rank(1) + dense
    assert isinstance(low_rank(1) * 2, LowRank)
