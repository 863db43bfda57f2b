"""A node's walk and the update that it sends are one change, drawn, scoped and counted as asked."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

import pytest
import torch
from torch import Tensor

import fedkernels as fk
from aggregators import Layout, decode, encode, match_targets
from aggregators.methods import ZerothOrderMethod
from aggregators.seed_sampling import drawn_indices
from fedclient.local import zeroth_order
from fedclient.local.estimators import ESTIMATORS
from fedclient.local.result import TrainingResult
from fedclient.local.zeroth_order import ZerothOrderError, train

PROBES = ["rank1", "rademacher", "popcount", "gaussian"]


def method(**changes: Any) -> ZerothOrderMethod:
    given_ = {"master_seed": 8, "pool_size": 32, "probe": "rank1", "epsilon": 1e-2, "clip": None}
    return ZerothOrderMethod.model_validate(given_ | changes)


def batches(count: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Rows that go on as they began, which a model can learn; the first half has no labels."""
    chance = torch.Generator().manual_seed(seed)
    for _ in range(count):
        start = torch.randint(20, (4, 1), generator=chance)
        ids = (start + 7 * torch.arange(10)) % 20
        labels = ids.clone()
        labels[:, :5] = -100
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def run(
    model: Any, asked: ZerothOrderMethod, steps: int = 20, rate: float = 1e-3, seed: int = 2
) -> tuple[Any, TrainingResult]:
    layout = Layout.from_model(model)
    return train(model, layout, batches(steps), asked, seed=seed, learning_rate=rate, steps=steps)


@pytest.mark.parametrize(
    ("estimator", "probe"),
    [*product(sorted(ESTIMATORS), PROBES[:2]), *product(["spsa", "momentum"], PROBES[2:])],
)
def test_the_update_is_what_the_walk_did_to_the_weights(
    estimator: str, probe: str, make_model: Callable[[str], Any]
) -> None:
    model = make_model("tied")
    before = copy.deepcopy(dict(model.named_parameters()))
    update, result = run(model, method(estimator=estimator, probe=probe, directions=2), 9)
    assert (result.steps, result.tokens, result.skipped) == (9, 9 * 4 * 5, 0)
    change = update.dense()
    assert change.keys() == before.keys()
    for name, weight in model.named_parameters():
        moved = weight.double() - before[name].double()
        # Every step may round once more; a walk of many terms has no larger error than that.
        allowed = 9 * 2.0**-23 * float(before[name].abs().max() + moved.abs().max())
        assert float((moved - change[name]).abs().max()) <= allowed
        assert float(moved.abs().max()) > 20 * allowed


@pytest.mark.parametrize("target_modules", [("q_proj", "down_proj"), ("all-linear",)])
def test_other_tensors_than_the_targets_stay(
    target_modules: tuple[str, ...], make_model: Callable[[str], Any]
) -> None:
    model = make_model("llama")
    layout = Layout.from_model(model)
    before = copy.deepcopy(dict(model.named_parameters()))
    update, _ = run(model, method(target_modules=target_modules))
    names = match_targets(layout, target_modules)
    changed = [n for n, weight in model.named_parameters() if not torch.equal(weight, before[n])]
    assert changed == names == list(update.names)
    received = decode(encode(update), layout).dense()
    assert received.keys() == set(names)
    for name, change in received.items():
        moved = model.get_parameter(name).double() - before[name].double()
        torch.testing.assert_close(moved, change, rtol=1e-3, atol=3e-6)


def test_a_quantised_base_is_not_moved_and_the_update_is_that_of_its_values(
    make_model: Callable[[str], Any],
) -> None:
    """The same walk as that of a dense model with the quantised values."""
    quantised, dense = make_model("llama"), make_model("llama")
    layout = Layout.from_model(dense)
    dense.load_state_dict(quantised.state_dict())
    fk.quantize_linears(quantised, "nf4")
    with torch.no_grad():
        for path, module in quantised.named_modules():
            if isinstance(module, fk.QuantizedLinear):
                dense.get_submodule(path).weight.copy_(module.weight)
    codes = {n: buffer.clone() for n, buffer in quantised.named_buffers()}
    updates = [
        train(m, layout, batches(25), method(), seed=3, learning_rate=1e-3, steps=25)[0]
        for m in (quantised, dense)
    ]
    assert all(torch.equal(buffer, codes[n]) for n, buffer in quantised.named_buffers())
    assert torch.equal(updates[0].indices, updates[1].indices)
    largest = float(updates[1].scalars.abs().max())
    torch.testing.assert_close(updates[0].scalars, updates[1].scalars, rtol=0, atol=2e-3 * largest)


@pytest.mark.parametrize("probe", ["rank1", "rademacher"])
def test_a_walk_is_a_function_of_its_seed(probe: str, make_model: Callable[[str], Any]) -> None:
    start = make_model("tied")
    one, again, other = (
        run(copy.deepcopy(start), method(probe=probe), seed=seed)[0] for seed in (2, 2, 3)
    )
    assert one == again
    assert not torch.equal(one.indices, other.indices)
    assert one.pool == other.pool


def test_draws_are_uniform_over_the_pool_and_distinct_within_a_step() -> None:
    drawn = list(islice(drawn_indices(7, 16), 8000))
    counts = torch.bincount(torch.tensor(drawn), minlength=16).double()
    assert float(((counts - 500) ** 2 / 500).sum()) < 45  # chi-squared, 15 degrees, p < 1e-4
    assert drawn[:9] != list(islice(drawn_indices(8, 16), 9))
    draws, four = drawn_indices(7, 4), method(pool_size=4, directions=8)
    for _ in range(20):
        assert sorted(zeroth_order._distinct(draws, four)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({}, 1e-3),
        ({"probe": "rademacher"}, 1e-3),
        ({"estimator": "adam", "directions": 2}, 4e-3),
        ({"estimator": "momentum", "probe": "gaussian"}, 1e-4),
    ],
)
def test_training_learns(
    changes: dict[str, Any], rate: float, make_model: Callable[[str], Any]
) -> None:
    model = make_model("tied")
    heard: list[tuple[int, int, float]] = []
    asked = method(pool_size=4096, epsilon=1e-3, **changes)
    _, result = train(
        model, Layout.from_model(model), batches(90), asked, seed=1, learning_rate=rate,
        steps=90, progress=lambda *report: heard.append(report),
    )  # fmt: skip
    assert [step for step, _, _ in heard] == list(range(1, 91))
    assert {steps for _, steps, _ in heard} == {90}
    assert (heard[0][2], heard[-1][2]) == (result.first_loss, result.last_loss)
    losses = [loss for _, _, loss in heard]
    assert sum(losses[-15:]) < 0.97 * sum(losses[:15])


@pytest.mark.parametrize(
    ("objective", "unit", "epsilon"),
    [("accuracy", 20, 0.1), ("exact-match", 4, 0.1), ("rouge-l", 20, 0.1)],
)
def test_an_objective_without_gradient_is_what_is_measured(
    objective: str, unit: int, epsilon: float, make_model: Callable[[str], Any]
) -> None:
    """Slopes are differences of counts: multiples of 1 / ``unit``, over 2 epsilon."""
    model = make_model("tied")
    layout, rate = Layout.from_model(model), 1e-9
    (batch,) = batches(1)
    with torch.no_grad():  # the answers that the model gives, so that a probe can spoil them
        best = model(input_ids=batch["input_ids"]).logits.argmax(2)
    batch["labels"][:, 5:] = best[:, 4:-1]
    if objective == "exact-match":
        batch["labels"][:, :9] = -100  # of five tokens, one is always wrong this far away
    asked = method(objective=objective, epsilon=epsilon, pool_size=4096, probe="rademacher")
    update, result = train(model, layout, [batch] * 25, asked, seed=1, learning_rate=rate, steps=25)
    differences = update.scalars.abs() / rate * 2 * epsilon * unit
    assert len(differences) >= 2
    torch.testing.assert_close(differences, differences.round(), rtol=0, atol=1e-5)
    assert 0 < result.last_loss < 10


def test_steps_without_a_finite_slope_are_counted_and_taken_out(
    make_model: Callable[[str], Any],
) -> None:
    model = make_model("tied")
    with torch.no_grad():
        model.model.norm.weight[3] = math.inf
    with pytest.raises(ZerothOrderError, match="finite"):
        run(model, method(), 3)


def test_fewer_batches_are_fewer_steps_and_more_are_left(make_model: Callable[[str], Any]) -> None:
    model = make_model("tied")
    layout, asked = Layout.from_model(model), method()
    _, short = train(model, layout, batches(3), asked, seed=1, learning_rate=1e-3, steps=9)
    stream = batches(9)
    _, whole = train(model, layout, stream, asked, seed=1, learning_rate=1e-3, steps=4)
    assert (short.steps, whole.steps, len(list(stream))) == (3, 4, 5)


def test_targets_that_are_not_there_are_refused(make_model: Callable[[str], Any]) -> None:
    model = make_model("tied")
    with pytest.raises(ZerothOrderError, match="nothing"):
        run(model, method(target_modules=("nothing",)))
    with pytest.raises(ZerothOrderError, match="other"):
        train(
            model, Layout({"other": (2, 2)}), batches(1), method(), seed=1, learning_rate=1e-3,
            steps=1,
        )  # fmt: skip
