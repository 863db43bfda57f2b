"""What probes reach, by its definition: blocks of layers by index, and one public mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedkernels as fk
from aggregators import GateContext, Layout, SeedScalars, UpdateRejected, Verdict, admit
from aggregators.codec import pack, unpack
from aggregators.methods import ZerothOrderMethod
from aggregators.probe_sum import ProbeSum
from aggregators.reach import Reach
from aggregators.targets import layer_count, match_targets, trained_names
from aggregators.view import View, read_view, view_parts

SHAPES: dict[str, tuple[int, ...]] = {"embed.weight": (6, 4)}
for number in range(5):
    SHAPES |= {f"layers.{number}.up.weight": (3, 4), f"layers.{number}.norm.weight": (4,)}
SHAPES["norm.weight"] = (4,)
LAYOUT = Layout(SHAPES)
POOL = 32
REACHES = st.builds(Reach, st.integers(1, 7), st.sampled_from([1.0, 0.5, 0.25]))


def change_of(update: SeedScalars, blocks: dict[str, int]) -> dict[str, torch.Tensor]:
    """Every probe made whole, and cut to its block and to the mask afterwards."""
    total = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in SHAPES.items()}
    for index, scalar in zip(update.indices.tolist(), update.scalars.tolist(), strict=True):
        seed = fk.derive_seed(update.master_seed, index)
        for name, change in total.items():
            if blocks[name] == index % update.reach.blocks:
                mask = update.reach.mask(update.master_seed, LAYOUT.tensor_id(name), change.shape)
                z = fk.noise(seed, LAYOUT.tensor_id(name), change.shape, update.probe).double()
                change += scalar * (z if mask is None else torch.where(mask, z, 0.0))
    return total


@given(
    reach=REACHES,
    probe=st.sampled_from(["rademacher", "rank1", "gaussian"]),
    indices=st.sets(st.integers(0, POOL - 1), min_size=1, max_size=8),
)
def test_update_and_sum_are_the_change_of_the_reached_elements(
    reach: Reach, probe: str, indices: set[int]
) -> None:
    scalars = [2.0**-8 * (1 + index) for index in indices]
    update = SeedScalars(LAYOUT, 5, POOL, sorted(indices), sorted(scalars), probe, reach=reach)
    expected = change_of(update, reach.block_of(LAYOUT, SHAPES))
    summed = ProbeSum.pool(LAYOUT, 5, POOL, probe, -20, reach=reach).add(update)
    header, tensors = view_parts(View(sums=(summed,)), None)
    assert read_view(*unpack(pack(header, tensors)), LAYOUT) == View(sums=(summed,))
    dense, of_sum = update.dense(), summed.dense()
    for name, change in expected.items():
        torch.testing.assert_close(dense[name], change, rtol=0, atol=1e-12)
        torch.testing.assert_close(of_sum.get(name, 0 * change), change, rtol=0, atol=1e-6)
        weight = torch.ones(SHAPES[name])
        summed.replay_(name, weight)
        torch.testing.assert_close(weight.double() - 1, change, rtol=0, atol=1e-6)
        assert bool((weight[change == 0] == 1).all())


@given(blocks=st.integers(1, 7))
def test_blocks_are_consecutive_layers_as_even_as_can_be(blocks: int) -> None:
    found = Reach(blocks).block_of(LAYOUT, SHAPES)
    in_order = [found[spec.name] for spec in LAYOUT]
    assert in_order == sorted(in_order)
    groups: list[list[int]] = [[] for _ in range(blocks)]
    for place, name in enumerate(["embed", *(f"layers.{n}.up" for n in range(5)), "norm"]):
        groups[found[f"{name}.weight"]].append(place)
    sizes = [len(group) for group in groups]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert all(found[f"layers.{n}.up.weight"] == found[f"layers.{n}.norm.weight"] for n in range(5))


def test_more_blocks_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="8 blocks of 7 layers"):
        Reach(8).block_of(LAYOUT, SHAPES)
    with pytest.raises(ValueError, match="3 blocks of 2 layers"):
        SeedScalars(
            LAYOUT, 1, 8, [0], [1.0], reach=Reach(3),
            names=match_targets(LAYOUT, ("up",), layers=(1, 3)),
        )  # fmt: skip


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_a_mask_has_the_share_that_was_asked_for(density: float) -> None:
    """Within five standard deviations; a mask of 0.1 that moves 54 % would be 150 away."""
    count = 1 << 16
    moving = Reach(density=density).mask(7, 3, (256, 256))
    assert moving is not None
    deviation = math.sqrt(count * density * (1 - density))
    assert abs(int(moving.sum()) - count * density) < 5 * deviation
    again = Reach(density=density).mask(7, 3, (256, 256))
    assert torch.equal(moving, again)
    for seed, tensor in ((8, 3), (7, 4)):
        other = Reach(density=density).mask(seed, tensor, (256, 256))
        both = int((moving & other).sum())
        assert both < count * density * density + 6 * deviation
    rows = fk.Part((256, 256), rows=[5, 77])
    part = Reach(density=density).mask(7, 3, (2, 256), rows)
    assert torch.equal(part, moving[[5, 77]])


@given(reach=REACHES)
def test_the_expected_norm_counts_what_is_reached(reach: Reach) -> None:
    update = SeedScalars(LAYOUT, 5, POOL, [3], [0.5], "rademacher", reach=reach)
    blocks = reach.block_of(LAYOUT, SHAPES)
    elements = sum(math.prod(s) for n, s in SHAPES.items() if blocks[n] == 3 % reach.blocks)
    assert update.expected_squared_norm() == pytest.approx(0.25 * elements * reach.density)


@pytest.mark.parametrize(
    ("method", "sent", "verdict"),
    [
        ({"estimator": "block-wise", "blocks": 3}, Reach(3), None),
        ({"estimator": "block-wise", "blocks": 3}, Reach(), Verdict.POOL),
        ({"estimator": "block-wise", "blocks": 3}, Reach(2), Verdict.POOL),
        ({"estimator": "sparse", "density": 0.25}, Reach(density=0.25), None),
        ({"estimator": "sparse", "density": 0.25}, Reach(density=0.5), Verdict.POOL),
        ({}, Reach(density=0.5), Verdict.POOL),
    ],
)
def test_the_gate_takes_only_the_plans_reach(
    method: dict[str, Any], sent: Reach, verdict: Any, layout: Any, make_plan: Any, make_reply: Any
) -> None:
    asked = {"master_seed": 5, "pool_size": POOL, "probe": "rank1", "epsilon": 1e-3, "clip": None}
    plan = make_plan().model_copy(
        update={"method": ZerothOrderMethod.model_validate(asked | method)}
    )
    update = SeedScalars(layout, 5, POOL, [1, 4], [1e-3, 2e-3], "rank1", reach=sent)
    reply = make_reply(update, plan)
    if verdict is None:
        assert admit(reply, GateContext(layout, plan)).update == update
        return
    with pytest.raises(UpdateRejected) as caught:
        admit(reply, GateContext(layout, plan))
    assert caught.value.verdict is verdict


@pytest.mark.parametrize("reach", [[0, 1.0], [2, 0.0], [2, 1.5], [2.0, 1.0], [99, 1.0], "x", [1]])
def test_a_reach_that_is_none_is_malformed(
    reach: Any, layout: Any, make_plan: Any, make_reply: Any, forge: Any
) -> None:
    asked = {"master_seed": 5, "pool_size": POOL, "probe": "rank1", "epsilon": 1e-3, "clip": None}
    plan = make_plan().model_copy(update={"method": ZerothOrderMethod.model_validate(asked)})
    reply = make_reply(SeedScalars(layout, 5, POOL, [1], [1e-3], "rank1"), plan)

    def damage(header: dict[str, Any], _: Any) -> None:
        header["reach"] = reach

    with pytest.raises(UpdateRejected) as caught:
        admit(forge(reply, body=damage), GateContext(layout, plan))
    assert caught.value.verdict is Verdict.MALFORMED


def test_layers_are_counted_and_chosen() -> None:
    assert layer_count(LAYOUT) == 5
    assert trained_names(LAYOUT, (), (1, 3)) == [n for n in SHAPES if ".1." in n or ".2." in n]
    assert match_targets(LAYOUT, ("up",), (4, 9)) == ["layers.4.up.weight"]
    assert trained_names(LAYOUT, ("up",), (5, 9)) == []
