"""Steps within a public basis: what a sketch tells of them is all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aggregators import Basis, Layout, Sketch, aggregate
from aggregators.methods import Optimiser
from fedclient.local.basis_optimiser import WithinBasis

LAYOUT = Layout({"tall": (40, 24), "wide": (18, 52), "small": (3, 4), "norm": (9,)})
OPTIMISERS: tuple[Optimiser, ...] = ("sgd", "adamw")


def random_tensors(seed: int) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=chance) for spec in LAYOUT}


def used_basis(seed: int, refinements: int) -> Basis:
    basis = Basis.random(LAYOUT, [spec.name for spec in LAYOUT], seed, 2, 2)
    for number in range(refinements):
        basis = basis.refined(Sketch.of(LAYOUT, basis, random_tensors(seed + number)))
    return basis


def walked(basis: Basis, optimiser: Optimiser, seed: int, steps: int) -> dict[str, Tensor]:
    """What some steps along random gradients change, from zero."""
    weights = {spec.name: torch.zeros(spec.shape) for spec in LAYOUT}
    walk = WithinBasis(weights, 0.1, optimiser, basis)
    for number in range(steps):
        for name, gradient in random_tensors(1000 * seed + number).items():
            weights[name].grad = gradient
        walk.step()
    return weights


@given(
    seed=st.integers(0, 2**20), refinements=st.integers(0, 2),
    optimiser=st.sampled_from(OPTIMISERS), steps=st.integers(1, 4),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_mean_of_a_cohort_is_read_whole(
    seed: int, refinements: int, optimiser: Optimiser, steps: int, weights: list[int]
) -> None:
    basis = used_basis(seed, refinements)
    changes = [walked(basis, optimiser, seed + node, steps) for node in range(len(weights))]
    sent = [Sketch.of(LAYOUT, basis, change) for change in changes]
    (mean,) = aggregate(list(zip(sent, weights, strict=True)), LAYOUT).updates.values()
    assert isinstance(mean, Sketch)
    read = mean.reconstruct(basis, within=True).dense() | mean.whole_change().dense()
    for name in basis.sides.keys() | set(basis.whole):
        whole = sum(c[name].double() * w for c, w in zip(changes, weights, strict=True))
        assert isinstance(whole, Tensor)
        expected = whole / sum(weights)
        torch.testing.assert_close(read[name], expected, rtol=0, atol=1e-5 * float(expected.norm()))


@given(seed=st.integers(0, 2**20), refinements=st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_a_step_of_gradient_descent_is_the_gradient_projected(seed: int, refinements: int) -> None:
    basis = used_basis(seed, refinements)
    change = walked(basis, "sgd", seed, 1)
    gradients = random_tensors(1000 * seed)
    for name, sides in basis.sides.items():
        q, y, gradient = sides.Q.double(), sides.Y.double(), gradients[name].double()
        left, right = y @ y.T, q @ q.T
        nearest = left @ gradient + gradient @ right - left @ gradient @ right
        torch.testing.assert_close(change[name].double(), -0.1 * nearest, rtol=0, atol=1e-5)
    for name in basis.whole:
        torch.testing.assert_close(change[name], -0.1 * gradients[name])


@given(seed=st.integers(0, 2**20), refinements=st.integers(0, 1))
@settings(max_examples=20, deadline=None)
def test_the_first_step_of_adamw_is_as_long_as_one_of_all_elements(
    seed: int, refinements: int
) -> None:
    basis = used_basis(seed, refinements)
    change = walked(basis, "adamw", seed, 1)
    for name in basis.sides:
        whole = 0.1 * math.sqrt(change[name].numel())
        # All of M's elements move by the rate; of N's what turned towards Y is lost.
        assert 0.6 * whole < float(change[name].norm()) <= whole * (1 + 1e-5)


def test_moments_take_the_room_of_a_sketch() -> None:
    basis = used_basis(3, 1)
    weights = {spec.name: torch.zeros(spec.shape) for spec in LAYOUT}
    walk = WithinBasis(weights, 0.1, "adamw", basis)
    for name, gradient in random_tensors(4).items():
        weights[name].grad = gradient
    walk.step()
    assert sum(m.first.numel() for m in walk.moments.values()) == basis.size
    with pytest.raises(ValueError, match="closure"):
        walk.step(lambda: 0.0)
