"""Scalars along probes of factors: the gate takes the plan's alone; norms and sizes are as said."""

from __future__ import annotations

from typing import Any

import pytest

from aggregators import (
    FactorScalars,
    GateContext,
    Layout,
    SeedScalars,
    UpdateRejected,
    Verdict,
    admit,
    decode,
    encode,
)
from aggregators.methods import FactorMethod
from aggregators.shared_factors import factor_layout

POOL = 64
METHOD = FactorMethod(
    target_modules=("q_proj", "up_proj"), master_seed=9, pool_size=POOL, probe="rademacher",
    epsilon=1e-3, clip=None, rank=2, scale=2.0, shared_seed=4,
)  # fmt: skip


def update(layout: Layout, **changes: Any) -> FactorScalars:
    given = {"rank": 2, "scale": 2.0, "shared_seed": 4, "modules": ("q_proj", "up_proj")}
    given |= {"master_seed": 9, "indices": [3, 8], "scalars": [1e-3, -2e-3]} | changes
    names = [n for n in (spec.name for spec in layout) if any(m in n for m in given["modules"])]
    own = factor_layout(layout, names, given["rank"])
    scalars = SeedScalars(own, given["master_seed"], POOL, given["indices"], given["scalars"])
    return FactorScalars(
        layout, names, given["rank"], given["scale"], given["shared_seed"], scalars
    )


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, None),
        ({"rank": 3}, Verdict.RANK),
        ({"scale": 3.0}, Verdict.POOL),
        ({"shared_seed": 5}, Verdict.POOL),
        ({"master_seed": 5}, Verdict.POOL),
        ({"modules": ("q_proj",)}, Verdict.UNKNOWN_TENSOR),
        ({"scalars": [0.0, 0.0]}, Verdict.EMPTY),
        ({"scalars": [2.0**31, 1.0]}, Verdict.OVERFLOW),
    ],
)
def test_the_gate(
    changes: dict[str, Any], verdict: Any, layout: Layout, make_plan: Any, make_reply: Any
) -> None:
    plan = make_plan().model_copy(update={"method": METHOD})
    sent = update(layout, **changes)
    reply = make_reply(sent, plan)
    if verdict is None:
        assert admit(reply, GateContext(layout, plan)).update == sent
        return
    with pytest.raises(UpdateRejected) as caught:
        admit(reply, GateContext(layout, plan))
    assert caught.value.verdict is verdict


@pytest.mark.parametrize(
    "factors",
    [None, [2, 2.0], [0, 2.0, 4], [2, -1.0, 4], [2, 2.0, -4], ["2", 2.0, 4], [9**9, 1.0, 1]],
)
def test_factors_that_are_none_are_refused(
    factors: Any, layout: Layout, make_plan: Any, make_reply: Any, forge: Any
) -> None:
    plan = make_plan().model_copy(update={"method": METHOD})

    def damage(header: dict[str, Any], _: Any) -> None:
        header["factors"] = factors

    with pytest.raises(UpdateRejected) as caught:
        admit(forge(make_reply(update(layout), plan), body=damage), GateContext(layout, plan))
    assert caught.value.verdict in (Verdict.MALFORMED, Verdict.RANK)


def test_a_pool_of_weights_does_not_answer_for_factors(
    layout: Layout, make_plan: Any, make_reply: Any
) -> None:
    plan = make_plan().model_copy(update={"method": METHOD})
    sent = SeedScalars(layout, 9, POOL, [3], [1e-3])
    with pytest.raises(UpdateRejected) as caught:
        admit(make_reply(sent, plan), GateContext(layout, plan))
    assert caught.value.verdict is Verdict.WRONG_FAMILY


def test_the_expected_norm_is_the_mean_of_the_norm(layout: Layout) -> None:
    norms = [update(layout, master_seed=seed).squared_norm() for seed in range(300)]
    mean = sum(norms) / len(norms)
    assert update(layout).expected_squared_norm() == pytest.approx(mean, rel=0.15)


def test_other_factors_do_not_add(layout: Layout) -> None:
    one = update(layout)
    for changes in ({"rank": 3}, {"scale": 1.0}, {"shared_seed": 5}, {"modules": ("q_proj",)}):
        with pytest.raises(ValueError, match="other factors"):
            one + update(layout, **changes)


def test_a_round_is_small(layout: Layout) -> None:
    indices = list(range(0, POOL, 2))
    sent = update(layout, indices=indices, scalars=[0.1 + k for k in indices])
    assert len(encode(sent, "int8")) < 700
    assert decode(encode(sent), layout) == sent
