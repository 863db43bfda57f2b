"""Arguments of the probes: integers of any library are integers; the rest is refused by its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fedkernels as fk


def test_integers_of_other_libraries_are_integers():
    expected = fk.noise(7, 3, (4, 5))
    for number in (np.int64, np.uint32, torch.tensor):
        assert torch.equal(fk.noise(number(7), number(3), (number(4), 5)), expected)
    seed = fk.derive_seed(np.int32(5), np.int64(3))
    assert type(seed) is int
    assert seed == fk.derive_seed(5, 3)
    moved = fk.replay_(torch.zeros(9), [1, 2], [3, -4], -3, 0)
    for seeds in ([np.int64(1), np.uint8(2)], np.array([1, 2]), torch.tensor([1, 2])):
        assert torch.equal(fk.replay_(torch.zeros(9), seeds, np.array([3, -4]), -3, 0), moved)


WEIGHT = torch.zeros(4, 3)
REFUSED = {
    "seed": [
        lambda: fk.noise(1.5, 0, (3,)),
        lambda: fk.noise("1", 0, (3,)),
        lambda: fk.noise(None, 0, (3,)),
        lambda: fk.noise(torch.tensor([1, 2]), 0, (3,)),
        lambda: fk.noise(-1, 0, (3,)),
        lambda: fk.noise(2**64, 0, (3,)),
    ],
    "tensor_id": [
        lambda: fk.noise(1, 2.0, (3,)),
        lambda: fk.noise(1, 2**64 - 1, (3,)),
        lambda: fk.SignAdapter.from_seeds([1], torch.ones(1), 0.5, (4, 3)),
    ],
    "shape": [
        lambda: fk.noise(1, 0, 4),
        lambda: fk.noise(1, 0, (2.5,)),
        lambda: fk.noise(1, 0, (-1,)),
        lambda: fk.Part((2.7,)),
        lambda: fk.SignAdapter.from_seeds([1], torch.ones(1), 0, 4),
    ],
    "part": [lambda: fk.noise(1, 0, (3,), part=(3, 4))],
    "offset": [lambda: fk.Part((10,), offset=1.5)],
    "rows": [lambda: fk.Part((10, 2), rows="ab"), lambda: fk.Part((10, 2), rows=[0.5])],
    "device": [lambda d=d: fk.noise(1, 0, (3,), device=d) for d in ("foo", "cuda:99", "meta", 1.5)],
    "scale": [
        lambda scale=scale: fk.perturb_(WEIGHT, 1, scale, 0)
        for scale in (None, "1", 1j, 10**400, float("nan"), 1e39, torch.ones(2))
    ],
    "seeds": [
        lambda: fk.replay_(WEIGHT, 1, [1], 0, 0),
        lambda: fk.project(WEIGHT, [1.5], 0),
        lambda: fk.project(WEIGHT, torch.ones(2), 0),
        lambda: fk.project(WEIGHT, [], 0),
        lambda: fk.SignAdapter.from_seeds([-1], torch.ones(1), 0, (4, 3)),
    ],
    "coefficients": [
        lambda: fk.replay_(WEIGHT, [1], 1, 0, 0),
        lambda: fk.replay_(WEIGHT, [1], [0.5], 0, 0),
        lambda: fk.replay_(WEIGHT, [1], [2**31], 0, 0),
        lambda: fk.SignAdapter.from_seeds([1], [1.0], 0, (4, 3)),
    ],
    "exponent": [
        lambda: fk.replay_(WEIGHT, [1], [1], float("nan"), 0),
        lambda: fk.replay_(WEIGHT, [1], [1], 0.5, 0),
        lambda: fk.replay_(WEIGHT, [1], [1], 513, 0),
    ],
    "weight": [
        lambda: fk.perturb_([1.0], 1, 1.0, 0),
        lambda: fk.perturb_(torch._neg_view(torch.ones(4)), 1, 0.5, 0),
        lambda: fk.replay_(torch.complex(WEIGHT, WEIGHT).conj().imag, [1], [1], 0, 0),
    ],
}


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name, calls in REFUSED.items() for call in calls]
)
def test_a_bad_argument_is_refused_by_its_name(name, call, backend):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call()
    assert not WEIGHT.any()


STEPS = {
    "perturb_": lambda weight: fk.perturb_(weight, 1, 0.5, 0),
    "perturbed": lambda weight: fk.perturbed(torch.ones(4), 1, 0.5, 0, out=weight),
    "replay_": lambda weight: fk.replay_(weight, [1], [1], 0, 0),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_backward_through_a_weight_moved_since_is_refused_as_torch_does(step, backend):
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * weight).sum()
    STEPS[step](weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_made_in_inference_mode_can_be_moved(backend):
    with torch.inference_mode():
        weight = torch.ones(4)
    assert torch.equal(fk.perturb_(weight, 1, 0.5, 0), fk.perturbed(torch.ones(4), 1, 0.5, 0))
