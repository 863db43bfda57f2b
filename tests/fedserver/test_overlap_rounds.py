"""A round under the rule "overlap": what the state becomes and what the ledger is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fedkernels as fk
from aggregators import Basis, Layout, LowRank, SeedScalars, Sketch
from fedserver.configuration import RunConfiguration, parse
from fedserver.global_model import GlobalModel, Mixed, first_basis, next_model

NAME = "layer.q_proj.weight"
LAYOUT = Layout({NAME: (24, 20)})
SEED = 5


def configuration(rule: str = "overlap", **weights: float) -> RunConfiguration:
    named = {strand.replace("_", "-"): weight for strand, weight in weights.items()}
    return parse(
        {
            "preset": "mixed",
            "nodes": [
                {"name": "a"},
                {"name": "b", "strand": "zeroth-order"},
                {"name": "c", "strand": "projected"},
            ],
            "projected": {"rank": 2, "oversampling": 2},
            "mixing": {"rule": rule, "weights": named},
        }
    )


def walk(amount: float) -> SeedScalars:
    return SeedScalars(LAYOUT, SEED, 8, [3], [amount], "rank1")


def same_direction(length: float) -> LowRank:
    """The change of a probe as a stack: a rank-one probe is its first column times its first row."""
    probe = fk.noise(fk.derive_seed(SEED, 3), 0, (24, 20), "rank1")
    return LowRank(LAYOUT, {NAME: (probe[:, :1], probe[:1] * probe[0, 0], length)})


def change(model: GlobalModel) -> torch.Tensor:
    total = torch.zeros(24, 20, dtype=torch.float64)
    for part in (model.carry, *model.sums):
        total += part.dense().get(NAME, torch.zeros(()))
    return total


def fold(updates: list[Any], asked: RunConfiguration) -> tuple[GlobalModel, Mixed]:
    return next_model(GlobalModel.empty(LAYOUT), updates, asked)


@pytest.mark.parametrize(("rule", "length"), [("add", 3.0), ("overlap", 1.75), ("mean", 1.75)])
def test_one_change_by_two_families_counts_once(rule: str, length: float) -> None:
    """Lengths 2 and 1, of three examples and one: their sum is 3, their mean 1.75."""
    found, mixed = fold([(same_direction(2.0), 3), (walk(1.0), 1)], configuration(rule))
    expected = length * same_direction(1.0).dense()[NAME]
    torch.testing.assert_close(change(found), expected, rtol=1e-3, atol=1e-3)
    if rule == "overlap":
        assert mixed.cosines == {"low_rank, seed_scalars": 1.0}
        assert mixed.shares == pytest.approx([0.75, 0.25], abs=1e-4)


def test_three_families_have_the_weights_of_their_dense_changes() -> None:
    """By the definition: lambda is least squares in what each family sees of the sum, in [0, 1]."""
    asked = configuration(zeroth_order=0.5)
    basis = first_basis(asked, LAYOUT)
    assert isinstance(basis, Basis)
    generator = torch.Generator().manual_seed(1)
    sketched = Sketch.of(LAYOUT, basis, {NAME: torch.randn(24, 20, generator=generator) / 10})
    b, a = torch.randn(24, 3, generator=generator), torch.randn(3, 20, generator=generator)
    stack = LowRank(LAYOUT, {NAME: (b, a, 0.1)}) + same_direction(0.3)
    updates = [(stack, 20), (walk(0.4), 30), (sketched, 50)]
    found, mixed = fold(updates, asked)
    read = sketched.reconstruct(basis, asked.projected.within)
    dense = torch.stack([u.dense()[NAME].flatten() for u in (stack, walk(0.4), read)])
    weights = mixed.weights | {"seed_scalars": mixed.weights["seed_scalars"] / 0.5}
    chosen = torch.tensor([weights[u.family] for u, _ in updates], dtype=torch.float64)
    lengths, examples = dense.norm(dim=1), torch.tensor([20.0, 30.0, 50.0])

    def distance(by: torch.Tensor) -> float:
        seen = dense @ (by @ dense) / lengths
        return float((examples * (seen - lengths).square()).sum())

    others = torch.rand(500, 3, dtype=torch.float64, generator=generator)
    assert bool(((chosen >= 0) & (chosen <= 1)).all())
    assert bool((chosen < 1).any())
    assert distance(chosen) <= min(map(distance, others)) * (1 + 1e-4)
    total = (chosen * torch.tensor([1.0, 0.5, 1.0])) @ dense
    torch.testing.assert_close(change(found).flatten(), total, rtol=1e-4, atol=1e-4)


def test_the_order_of_arrival_leaves_the_state_as_it_is() -> None:
    updates: list[Any] = [(same_direction(2.0), 3), (walk(1.0), 1), (walk(0.25), 2)]
    found, _ = fold(updates, configuration())
    again, _ = fold(updates[::-1], configuration())
    assert again.digest() == found.digest()
