"""Zeroth-order below a cut and LoRA above it: one point, two steps, one reply."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fedkernels as fk
from aggregators import Layout, LowRank, SeedScalars
from aggregators.messages import Plan
from aggregators.methods import HybridMethod, LoraMethod
from fedclient.local import hybrid
from fedclient.local.zeroth_order import ZerothOrderError


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    chance = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = (torch.randint(20, (4, 1), generator=chance) + 7 * torch.arange(10)) % 20
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found


@pytest.fixture
def plan_of(make_plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """A maker of plans that cut a model of two layers in the middle."""

    def make(probe: str = "rank1", steps: int = 1, rate: float = 1e-3, **changes: Any) -> Plan:
        plan = make_plan(local_steps=steps, learning_rate=rate, **changes)
        upper = plan.lora.model_copy(update={"layers": (1, 2)})
        assert isinstance(upper, LoraMethod)
        lower = {
            "family": "seed_scalars", "master_seed": 8, "pool_size": 64, "probe": probe,
            "epsilon": 1e-3, "clip": None, "layers": (0, 1),
        }  # fmt: skip
        method = HybridMethod.model_validate(
            {"lower": lower, "upper": upper, "upper_learning_rate": 5e-3}
        )
        return plan.model_copy(update={"method": method})

    return make


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


@pytest.mark.parametrize("probe", ["rank1", "gaussian"])
@pytest.mark.parametrize("architecture", ["tied", "llama"])
def test_one_step_is_that_of_the_definitions(
    architecture: str, probe: str, make_model: Callable[[str], Any], plan_of: Callable[..., Plan]
) -> None:
    """A difference quotient on copies that were really moved, and Adam's first step of autograd."""
    model = make_model(architecture)
    start = copy.deepcopy(model)
    layout, (batch,) = Layout.from_model(model), batches(1)
    plan = plan_of(probe)
    update, _ = hybrid.train(model, layout, [batch], plan)
    lower, upper = update.parts
    assert isinstance(lower, SeedScalars)
    assert isinstance(upper, LowRank)
    (index,), (scalar,) = lower.indices.tolist(), lower.scalars.tolist()
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(start)
        with torch.no_grad():
            for name, weight in moved.named_parameters():
                if ".layers.0." in name:
                    seed = fk.derive_seed(8, index)
                    z = fk.noise(seed, layout.tensor_id(name), weight.shape, probe)
                    weight.add_(z, alpha=sign * 1e-3)
            sides.append(float(loss_of(moved, batch)))
    slope = (sides[0] - sides[1]) / 2e-3
    assert scalar == pytest.approx(-1e-3 * slope, rel=2e-2, abs=2e-6)
    for name, weight in start.named_parameters():
        weight.requires_grad_(name in upper.factors)
    loss_of(start, batch).backward()
    for name, factors in upper.factors.items():
        slopes = float(factors.scale[0]) * start.get_parameter(name).grad @ factors.A.T
        clear = slopes.abs() > 1e-5
        assert bool(clear.any())
        torch.testing.assert_close(
            factors.B[clear], -5e-3 * slopes[clear].sign(), rtol=1e-2, atol=0
        )


def test_the_parts_are_of_either_side_and_the_walk_is_what_moved(
    make_model: Callable[[str], Any], plan_of: Callable[..., Plan]
) -> None:
    model = make_model("tied")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    layout = Layout.from_model(model)
    update, result = hybrid.train(model, layout, batches(9), plan_of(steps=7))
    assert result.steps == 7
    lower, upper = update.parts
    change = lower.dense()
    assert set(lower.names) == {spec.name for spec in layout if ".layers.0." in spec.name}
    assert set(upper.factors) == {
        spec.name for spec in layout if ".layers.1." in spec.name and len(spec.shape) == 2
    }
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, weight in after.items():
        expected = before[name].double() + change.get(name, 0)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-6, msg=name)
        assert torch.equal(weight, before[name]) == (name not in change)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_nothing_below_the_cut_keeps_activations(
    make_model: Callable[[str], Any], plan_of: Callable[..., Plan]
) -> None:
    model = make_model("tied")
    needed: list[tuple[bool, bool]] = []

    def note(place: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                needed.append((place == 1, hidden.requires_grad))

        return hook

    for place, layer in enumerate(model.model.layers):
        layer.register_forward_hook(note(place))
    hybrid.train(model, Layout.from_model(model), batches(2), plan_of(steps=2))
    assert needed
    assert all(upper == required for upper, required in needed)


@pytest.mark.parametrize("accelerate", [True, False])
def test_training_learns_and_is_a_function_of_its_seed(
    accelerate: bool, make_model: Callable[[str], Any], plan_of: Callable[..., Plan]
) -> None:
    start = make_model("tied")
    layout = Layout.from_model(start)
    heard: list[float] = []
    plan = plan_of(steps=40, accelerate=accelerate)
    found = [
        hybrid.train(
            copy.deepcopy(start), layout, batches(40), plan,
            progress=lambda step, steps, loss: heard.append(loss),
        )[0]
        for _ in range(2)
    ]  # fmt: skip
    assert found[0] == found[1]
    assert sum(heard[30:40]) < 0.97 * sum(heard[:10])


def test_weights_that_hold_no_small_step_are_an_error_of_one_line(
    make_model: Callable[[str], Any], plan_of: Callable[..., Plan]
) -> None:
    model = make_model("tied").to(torch.bfloat16)
    with pytest.raises(ZerothOrderError, match="base_dtype"):
        hybrid.train(model, Layout.from_model(model), batches(1), plan_of())
