"""Zeroth-order walks of LoRA's B: what is measured, walked and sent is one low-rank change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fedkernels as fk
from aggregators import FactorScalars, Layout, SeedScalars, decode, encode, match_targets
from aggregators.methods import FactorMethod
from aggregators.reach import Reach
from aggregators.shared_factors import factor_layout
from fedclient.local.perturbation import factored
from fedclient.local.scope import Scope
from fedclient.local.zeroth_order import ZerothOrderError, train

POOL, MASTER = 24, 8


def method(**changes: Any) -> FactorMethod:
    given_ = {
        "target_modules": ("all-linear",),
        "master_seed": MASTER,
        "pool_size": POOL,
        "probe": "rademacher",
        "epsilon": 1e-2,
        "clip": None,
        "rank": 3,
        "scale": 2.0,
        "shared_seed": 91,
    }
    return FactorMethod.model_validate(given_ | changes)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    chance = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = (torch.randint(20, (4, 1), generator=chance) + 7 * torch.arange(10)) % 20
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found


def moved(model: Any, layout: Layout, asked: FactorMethod, terms: dict[int, float]) -> Any:
    """A copy of the model with the update's own dense change added to its weights."""
    names = match_targets(layout, asked.target_modules)
    own = factor_layout(layout, names, asked.rank)
    indices = sorted(terms)
    scalars = SeedScalars(
        own, MASTER, POOL, indices, [terms[k] for k in indices], asked.probe, reach=asked.reach
    )
    change = FactorScalars(layout, names, asked.rank, asked.scale, asked.shared_seed, scalars)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in change.dense().items():
            weight = other.get_parameter(name)
            weight.copy_((weight.double() + delta).float())
    return other


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.parametrize("reach", [Reach(), Reach(2), Reach(density=0.5)], ids=str)
@pytest.mark.parametrize("probe", ["rademacher", "rank1"])
@pytest.mark.parametrize("architecture", ["tied", "gpt2", "gemma2"])
def test_losses_are_those_of_weights_with_the_change(
    architecture: str, probe: str, reach: Reach, make_model: Callable[[str], Any]
) -> None:
    model = make_model(architecture)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    layout, (batch,) = Layout.from_model(model), batches(1)
    estimator = {2: "block-wise"}.get(reach.blocks, "spsa" if reach.density == 1 else "sparse")
    asked = method(probe=probe, estimator=estimator, blocks=2, density=0.5)
    assert asked.reach == reach
    own = factor_layout(layout, match_targets(layout, asked.target_modules), asked.rank)
    scope = Scope(own, None, MASTER, reach)
    walk = {k: 3e-2 * (-1) ** k for k in range(6)}
    points = [(2, 5e-2), (3, -5e-2), (3, 0.0)]
    with factored(model, layout, own, asked, scope) as perturbed:
        perturbed.move({scope.seed(k): amount for k, amount in walk.items()})
        at = [(scope.seed(k), scale) for k, scale in points]
        found = [said.loss for said in perturbed.predictions(batch, at)]
    expected = [
        loss_of(moved(model, layout, asked, walk | {k: walk[k] + scale}), batch)
        for k, scale in points
    ]
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(expected) > min(expected) * (1 + 1e-4)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("quantised", [False, True])
def test_training_learns_and_moves_no_weight(
    quantised: bool, make_model: Callable[[str], Any]
) -> None:
    model = make_model("tied")
    layout = Layout.from_model(model)
    if quantised:
        fk.quantize_linears(model, "nf4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heard: list[float] = []
    update, result = train(
        model, layout, batches(90), method(pool_size=4096), seed=1, learning_rate=3e-2, steps=90,
        progress=lambda step, steps, loss: heard.append(loss),
    )  # fmt: skip
    assert result.steps == 90
    assert sum(heard[-15:]) < 0.97 * sum(heard[:15])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(update, FactorScalars)
    assert decode(encode(update), layout) == update
    assert len(encode(update, "int8")) < 1000
    assert all(torch.linalg.matrix_rank(change) <= 3 for change in update.dense().values())


def test_the_update_is_the_change_that_the_walk_measured(make_model: Callable[[str], Any]) -> None:
    """The loss after the last step is that of the base with the update added."""
    model = make_model("llama")
    layout, stream = Layout.from_model(model), batches(12)
    rest: dict[str, Any] = {"seed": 4, "learning_rate": 2e-2}
    update, _ = train(model, layout, stream, method(), **rest, steps=11)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, change in update.dense().items():
            weight = other.get_parameter(name)
            weight.copy_((weight.double() + change).float())
    own = factor_layout(layout, match_targets(layout, ("all-linear",)), 3)
    scope = Scope(own, None, MASTER)
    terms = dict(zip(update.scalars.seeds, update.scalars.scalars.tolist(), strict=True))
    with factored(model, layout, own, method(), scope) as perturbed:
        perturbed.move(terms)
        (said,) = perturbed.predictions(stream[0], [(0, 0.0)])
    assert said.loss == pytest.approx(loss_of(other, stream[0]), rel=1e-5)
    assert said.loss != pytest.approx(loss_of(model, stream[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("targets", "words"), [(("nothing",), "match no matrix"), (("embed_tokens",), "linear layers")]
)
def test_factors_beside_what_is_no_linear_layer_are_an_error_of_one_line(
    targets: tuple[str, ...], words: str, make_model: Callable[[str], Any]
) -> None:
    model = make_model("tied")
    layout = Layout.from_model(model)
    with pytest.raises(ZerothOrderError, match=words):
        train(
            model, layout, batches(1), method(target_modules=targets),
            seed=1, learning_rate=1.0, steps=1,
        )  # fmt: skip
