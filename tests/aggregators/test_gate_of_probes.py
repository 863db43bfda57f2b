"""The gate for updates along probes: what is not the plan's pool, count or size has its verdict."""

from __future__ import annotations

import math

import pytest
import torch

from aggregators import GateContext, ProjectedGradient, SeedScalars, UpdateRejected, Verdict, admit
from aggregators.codec import pack, unpack
from aggregators.index_coding import encode_indices
from aggregators.messages import body_digest
from aggregators.methods import ProjectedMethod, ZerothOrderMethod

Q, UP = (f"model.layers.0.{part}.weight" for part in ("q_proj", "up_proj"))
POOL = ZerothOrderMethod(master_seed=9, pool_size=64, probe="rank1", epsilon=1e-3, clip=None)
PROJECTION = ProjectedMethod(
    target_modules=(), master_seed=9, probe="rademacher", coordinates={Q: 3, UP: 2},
    optimiser="sgd", error_feedback=False,
)  # fmt: skip


def scalars(layout, indices=(3, 8, 60), values=(1e-3, -2e-3, 5e-4), **changes):
    given = {"master_seed": 9, "pool_size": 64, "probe": "rank1"} | changes
    return SeedScalars(layout, indices=indices, scalars=values, **given)


def coordinates(layout, master_seed=9, **changes):
    values = {Q: torch.tensor([1.0, -2.0, 0.5]), UP: torch.tensor([0.1, 0.2])} | changes
    kept = {name: value for name, value in values.items() if value is not None}
    return ProjectedGradient(layout, master_seed, kept)


def verdict(make_reply, make_plan, layout, method, update, damage=None):
    plan = make_plan().model_copy(update={"method": method})
    reply = make_reply(update, plan)
    if damage is not None:
        header, tensors = unpack(reply)
        inner, parts = unpack(tensors["body"].numpy().tobytes())
        damage(inner, parts)
        body = pack(inner, parts)
        header["envelope"]["payload_digest"] = body_digest(body)
        reply = pack(header, {"body": torch.frombuffer(bytearray(body), dtype=torch.uint8)})
    try:
        return admit(reply, GateContext(layout, plan)).update
    except UpdateRejected as rejection:
        return rejection.verdict


def test_honest_updates_pass_whole(make_reply, make_plan, layout):
    for method, update in ((POOL, scalars(layout)), (PROJECTION, coordinates(layout))):
        assert verdict(make_reply, make_plan, layout, method, update) == update


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"master_seed": 10}, Verdict.POOL),
        ({"pool_size": 65}, Verdict.POOL),
        ({"probe": "gaussian"}, Verdict.POOL),
        ({"values": (0.0, 0.0, 0.0)}, Verdict.EMPTY),
        ({"indices": (), "values": ()}, Verdict.EMPTY),
        ({"values": (1e-3, 5e-324, 1e-3)}, Verdict.NOT_FINITE),
        ({"values": (2.0**31, 1e-3, 1e-3)}, Verdict.OVERFLOW),
    ],
)
def test_scalars_of_another_walk(make_reply, make_plan, layout, changes, expected):
    update = scalars(layout, **changes)
    assert verdict(make_reply, make_plan, layout, POOL, update) is expected


@pytest.mark.parametrize(
    ("part", "value", "expected"),
    [
        ("numbers", torch.tensor([1.0, math.nan, 1.0]).double(), Verdict.NOT_FINITE),
        ("numbers", torch.tensor([1.0, math.inf, 1.0]).double(), Verdict.NOT_FINITE),
        ("numbers", torch.ones(65).double(), Verdict.SHAPE),
        ("numbers", torch.ones(3).int(), Verdict.DTYPE),
        ("numbers", None, Verdict.MALFORMED),
        # An index outside the pool, and an end of the code before its time.
        ("indices", bytes(encode_indices([3, 8, 9000])), Verdict.MALFORMED),
        ("indices", b"", Verdict.MALFORMED),
        ("surprise", torch.ones(1), Verdict.UNKNOWN_TENSOR),
    ],
)
def test_damaged_scalars(make_reply, make_plan, layout, part, value, expected):
    def damage(_, parts):
        if value is None:
            del parts[part]
        elif isinstance(value, bytes):
            parts[part] = torch.tensor(list(value), dtype=torch.uint8)
        else:
            parts[part] = value

    assert verdict(make_reply, make_plan, layout, POOL, scalars(layout), damage) is expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"master_seed": 10}, Verdict.POOL),
        ({"temperature": torch.ones(1)}, Verdict.UNKNOWN_TENSOR),
        ({Q: torch.ones(4)}, Verdict.SHAPE),
        ({Q: None}, Verdict.SHAPE),
        ({Q: torch.zeros(3), UP: torch.zeros(2)}, Verdict.EMPTY),
        ({UP: torch.tensor([1.0, 1e-310], dtype=torch.float64)}, Verdict.NOT_FINITE),
        ({UP: torch.tensor([1.0, 1e30])}, Verdict.OVERFLOW),
    ],
)
def test_another_projection(make_reply, make_plan, layout, changes, expected):
    update = coordinates(layout, **changes)
    assert verdict(make_reply, make_plan, layout, PROJECTION, update) is expected


def test_a_pool_does_not_answer_a_projection(make_reply, make_plan, layout):
    found = verdict(make_reply, make_plan, layout, PROJECTION, scalars(layout))
    assert found is Verdict.WRONG_FAMILY


def test_a_loud_walk_is_above_the_norm(make_reply, make_plan, layout):
    plan = make_plan(max_norm=1e-4).model_copy(update={"method": POOL})
    with pytest.raises(UpdateRejected) as caught:
        admit(make_reply(scalars(layout), plan), GateContext(layout, plan))
    assert caught.value.verdict is Verdict.NORM
