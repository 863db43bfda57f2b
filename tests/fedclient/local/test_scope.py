"""Block-wise and sparse walks: measured, moved and sent are one change, of what the probes reach."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import fedkernels as fk
from aggregators import Layout, SeedScalars
from aggregators.methods import ZerothOrderMethod
from aggregators.reach import Reach
from fedclient.local.perturbation import perturbable
from fedclient.local.scope import Scope
from fedclient.local.zeroth_order import ZerothOrderError, train

POOL, MASTER = 24, 8
REACHES = [Reach(3), Reach(density=0.3), Reach(2, 0.5)]


def method(**changes: Any) -> ZerothOrderMethod:
    given_ = {
        "master_seed": MASTER,
        "pool_size": POOL,
        "probe": "rank1",
        "epsilon": 1e-3,
        "clip": None,
    }
    return ZerothOrderMethod.model_validate(given_ | changes)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    chance = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = (torch.randint(20, (4, 1), generator=chance) + 7 * torch.arange(10)) % 20
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float(model(**batch).loss)


def moved(
    model: Any, layout: Layout, probe: str, reach: Reach, terms: list[tuple[int, float]]
) -> Any:
    """A copy of the model, with the update's own slow dense change."""
    amounts: dict[int, float] = {}
    for index, amount in terms:
        amounts[index] = amounts.get(index, 0.0) + amount
    indices = sorted(amounts)
    scalars = [amounts[index] for index in indices]
    change = SeedScalars(layout, MASTER, POOL, indices, scalars, probe, reach=reach).dense()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            weight.copy_((weight.double() + change.get(name, 0)).float())
    return other


@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("probe", ["rank1", "rademacher"])
@pytest.mark.parametrize("architecture", ["tied", "gpt2"])
def test_losses_on_a_walk_are_those_of_a_model_that_was_really_moved(
    architecture: str, probe: str, reach: Reach, make_model: Callable[[str], Any]
) -> None:
    model = make_model(architecture)
    layout, (batch,) = Layout.from_model(model), batches(1)
    start = copy.deepcopy(model)
    scope = Scope(layout, None, MASTER, reach)
    walk = [(k % 7, 3e-3 * (-1) ** k) for k in range(11)]
    points = [(2, 1e-2), (2, -1e-2), (3, 2e-2), (4, 0.0)]
    with perturbable(model, layout, probe, scope=scope) as asked:
        for place, (index, amount) in enumerate(walk):
            seed = scope.seed(index)
            if place % 3:
                asked.predictions(batch, [(seed, 1e-3), (seed, -1e-3)])
            asked.move({seed: amount})
        found = asked.predictions(batch, [(scope.seed(k), scale) for k, scale in points])
    expected = [
        loss_of(moved(start, layout, probe, reach, [*walk, point]), batch) for point in points
    ]
    assert [said.loss for said in found] == pytest.approx(expected, rel=1e-5)
    assert max(expected) > min(expected) * (1 + 1e-4)
    final = moved(start, layout, probe, reach, walk)
    for (name, weight), want in zip(model.named_parameters(), final.parameters(), strict=True):
        torch.testing.assert_close(weight, want, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_beside_a_quantised_base_too(reach: Reach, make_model: Callable[[str], Any]) -> None:
    model, dense = make_model("llama"), make_model("llama")
    layout, (batch,) = Layout.from_model(dense), batches(1)
    dense.load_state_dict(model.state_dict())
    fk.quantize_linears(model, "nf4")
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, fk.QuantizedLinear):
                dense.get_submodule(path).weight.copy_(module.weight)
    scope = Scope(layout, None, MASTER, reach)
    walk = [(k, 2e-3 * (-1) ** k) for k in range(10)]
    with perturbable(model, layout, "rank1", scope=scope) as asked:
        for index, amount in walk:
            asked.move({scope.seed(index): amount})
        (found,) = asked.predictions(batch, [(scope.seed(5), 1e-2)])
    expected = loss_of(moved(dense, layout, "rank1", reach, [*walk, (5, 1e-2)]), batch)
    assert found.loss == pytest.approx(expected, rel=1e-5)


def test_a_step_perturbs_one_block(make_model: Callable[[str], Any]) -> None:
    model = make_model("tied")
    layout, stream = Layout.from_model(model), batches(30)
    asked = method(estimator="block-wise", blocks=3, directions=2)
    rest: dict[str, Any] = {"seed": 4, "learning_rate": 1e-3}
    walked: list[set[int]] = [set()]
    blocks = Reach(3).block_of(layout, [spec.name for spec in layout])
    drawn = set()
    for steps in range(1, 9):
        update, _ = train(copy.deepcopy(model), layout, stream, asked, **rest, steps=steps)
        walked.append(set(update.indices.tolist()))
        before = dict(model.named_parameters())
        if steps == 1:
            own = copy.deepcopy(model)
            train(own, layout, stream, asked, **rest, steps=1)
            changed = {
                blocks[n] for n, w in own.named_parameters() if not torch.equal(w, before[n])
            }
            assert changed == {next(iter(walked[1])) % 3}
    for earlier, later in pairwise(walked):
        new = {index % 3 for index in later - earlier}
        assert len(new) <= 1
        drawn |= new
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"estimator": "block-wise", "blocks": 3}, 2e-3),
        ({"estimator": "block-wise", "blocks": 3, "probe": "rademacher"}, 4e-3),
        ({"estimator": "sparse", "density": 0.1}, 2e-2),
        ({"estimator": "sparse", "density": 0.1, "probe": "gaussian"}, 1e-2),
    ],
)
def test_training_learns(
    changes: dict[str, Any], rate: float, make_model: Callable[[str], Any]
) -> None:
    model = make_model("tied")
    heard: list[float] = []
    asked = method(**{"pool_size": 4096} | changes)
    train(
        model, Layout.from_model(model), batches(120), asked, seed=1, learning_rate=rate,
        steps=120, progress=lambda step, steps, loss: heard.append(loss),
    )  # fmt: skip
    assert sum(heard[-15:]) < 0.97 * sum(heard[:15])


def test_more_blocks_than_layers_are_an_error_of_one_line(make_model: Callable[[str], Any]) -> None:
    model = make_model("tied")
    with pytest.raises(ZerothOrderError, match="blocks of 4 layers"):
        train(
            model, Layout.from_model(model), batches(1),
            method(estimator="block-wise", blocks=9), seed=1, learning_rate=1, steps=1,
        )  # fmt: skip


def test_only_the_chosen_layers_are_trained(make_model: Callable[[str], Any]) -> None:
    model = make_model("tied")
    before = copy.deepcopy(dict(model.named_parameters()))
    layout = Layout.from_model(model)
    update, _ = train(
        model, layout, batches(3), method(layers=(1, 2)), seed=1, learning_rate=1e-3, steps=3
    )
    changed = [n for n, weight in model.named_parameters() if not torch.equal(weight, before[n])]
    assert changed == [spec.name for spec in layout if ".layers.1." in spec.name]
    assert update.names == tuple(changed)
