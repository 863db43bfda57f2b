"""Two families in one update: linear, whole on the wire, each part in its own family's mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aggregators import (
    GateContext,
    Layout,
    LowRank,
    Pair,
    SeedScalars,
    UpdateRejected,
    Verdict,
    admit,
    aggregate,
    decode,
    encode,
)
from aggregators.methods import HybridMethod

LAYOUT = Layout({f"layers.{n}.up.weight": (5, 4) for n in range(4)})
LOWER, UPPER = ["layers.0.up.weight", "layers.1.up.weight"], ["layers.2.up.weight"]
WEIGHTS = st.floats(0.1, 50)


@st.composite
def scalars(draw: Any) -> SeedScalars:
    indices = sorted(draw(st.sets(st.integers(0, 15), min_size=1, max_size=4)))
    values = [draw(st.floats(-1, 1)) for _ in indices]
    return SeedScalars(LAYOUT, 3, 16, indices, values, names=LOWER)


@st.composite
def stacks(draw: Any, names: Any = UPPER) -> LowRank:
    chance = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    rank = draw(st.integers(1, 3))
    b, a = torch.randn(5, rank, generator=chance), torch.randn(rank, 4, generator=chance)
    return LowRank(LAYOUT, {name: (b, a, 0.5) for name in names})


PAIRS = st.builds(lambda one, two: Pair([one, two]), scalars(), stacks())


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in found.keys() | expected.keys():
        zero = torch.zeros(LAYOUT.shape(name), dtype=torch.float64)
        torch.testing.assert_close(
            found.get(name, zero), expected.get(name, zero), rtol=1e-6, atol=1e-9
        )


def weighted(terms: list[tuple[Any, float]]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for update, coefficient in terms:
        for name, change in update.dense().items():
            total[name] = total.get(name, 0) + coefficient * change
    return total


@given(one=PAIRS, two=PAIRS, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_pairs_are_linear_and_come_back_from_the_wire(
    one: Pair, two: Pair, a: float, b: float
) -> None:
    close((one * a + two * b).dense(), weighted([(one, a), (two, b)]))
    close((one - two).dense(), weighted([(one, 1), (two, -1)]))
    close(one.dense(), weighted([(part, 1) for part in one.parts]))
    assert decode(encode(one), LAYOUT) == one
    dense = one.dense()
    squares = sum(float(change.square().sum()) for change in dense.values())
    assert one.squared_norm() == pytest.approx(squares, rel=1e-6, abs=1e-12)
    theirs = two.dense()
    inner = sum(float((dense[n] * theirs[n]).sum()) for n in dense.keys() & theirs.keys())
    assert one.inner(two) == pytest.approx(inner, rel=1e-6, abs=1e-6)


@given(
    cohort=st.lists(
        st.tuples(st.one_of(PAIRS, scalars(), stacks(UPPER + LOWER)), WEIGHTS),
        min_size=1,
        max_size=6,
    ),
    rule=st.sampled_from(["add", "mean"]),
)
def test_each_part_is_in_the_mean_of_its_family(cohort: list[tuple[Any, float]], rule: Any) -> None:
    """Of its family's tensor: what LoRA nodes change below a hybrid node's cut is theirs alone."""
    groups: dict[str, list[tuple[Any, float]]] = {}
    for update, weight in cohort:
        for part in getattr(update, "parts", (update,)):
            groups.setdefault(part.family, []).append((part, weight))
    everyone = sum(weight for _, weight in cohort)
    expected: dict[str, torch.Tensor] = {}
    for members in groups.values():
        for spec in LAYOUT:
            held = [(part.dense(), weight) for part, weight in members]
            held = [(change[spec.name], weight) for change, weight in held if spec.name in change]
            divisor = sum(weight for _, weight in held) if rule == "add" else everyone
            for change, weight in held:
                known = expected.get(spec.name, torch.zeros(spec.shape, dtype=torch.float64))
                expected[spec.name] = known + change * (weight / divisor)
    found = aggregate(cohort, LAYOUT, rule)
    close(found.dense(), expected)
    if rule == "add":
        assert sum(found.shares) == pytest.approx(len(groups))
    again = aggregate(cohort[::-1], LAYOUT, rule)
    for family, update in found.updates.items():
        assert encode(again.updates[family]) == encode(update)


def test_what_is_no_pair_is_refused() -> None:
    one = SeedScalars(LAYOUT, 3, 16, [1], [1.0], names=LOWER)
    two = LowRank(LAYOUT, {UPPER[0]: (torch.ones(5, 1), torch.ones(1, 4), 1.0)})
    for parts in ([one], [one, one], [one, two, two], [Pair([one, two]), one]):
        with pytest.raises(ValueError, match="two families"):
            Pair(parts)
    with pytest.raises(ValueError, match="other families"):
        Pair([one, two]) + Pair([two, one])


LOWER_METHOD: dict[str, Any] = {
    "family": "seed_scalars", "master_seed": 3, "pool_size": 16, "probe": "rademacher",
    "epsilon": 1e-3, "clip": None, "layers": (0, 2),
}  # fmt: skip
UPPER_METHOD: dict[str, Any] = {
    "family": "low_rank", "target_modules": ("up",), "rank": 2, "alpha": 2.0, "rslora": False,
    "dropout": 0.0, "init": "random", "train_a": True, "start": "fresh", "sends": "factors",
    "shared_seed": 1, "weight_decay": 0.0, "warmup_steps": 0, "layers": (2, 3),
}  # fmt: skip
METHOD = HybridMethod.model_validate(
    {"lower": LOWER_METHOD, "upper": UPPER_METHOD, "upper_learning_rate": 1e-3}
)


def honest(**changes: Any) -> Any:
    given_ = {"names": LOWER, "upper": UPPER, "rank": 2, "value": 1e-3} | changes
    b, a = torch.ones(5, given_["rank"]), torch.ones(given_["rank"], 4)
    one = SeedScalars(LAYOUT, 3, 16, [1, 4], [given_["value"], 1e-3], names=given_["names"])
    two = LowRank(LAYOUT, {name: (b, a, 1.0) for name in given_["upper"]})
    parts = [two, one] if given_.get("turned") else [one, two]
    return one if given_.get("alone") else Pair(parts)


def only(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    header["parts"] = header["parts"][:1]


def stray(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["2.numbers"] = torch.ones(1)


def nested(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    header["parts"][0] = {"family": "pair", "parts": []}


@pytest.mark.parametrize(
    ("changes", "damage", "verdict"),
    [
        ({}, None, None),
        ({"turned": True}, None, Verdict.WRONG_FAMILY),
        ({"alone": True}, None, Verdict.WRONG_FAMILY),
        ({"names": None}, None, Verdict.POOL),
        ({"upper": LOWER}, None, Verdict.UNKNOWN_TENSOR),
        ({"rank": 3}, None, Verdict.RANK),
        ({"value": 2.0**40}, None, Verdict.OVERFLOW),
        ({}, only, Verdict.MALFORMED),
        ({}, stray, Verdict.UNKNOWN_TENSOR),
        ({}, nested, Verdict.MALFORMED),
    ],
)
def test_the_gate_reads_either_part_by_its_own_method(
    changes: dict[str, Any], damage: Any, verdict: Any, make_plan: Any, make_reply: Any, forge: Any
) -> None:
    plan = make_plan().model_copy(update={"method": METHOD, "layout": LAYOUT.fingerprint})
    sent = honest(**changes)
    reply = make_reply(sent, plan)
    if damage is not None:
        reply = forge(reply, body=damage)
    context = GateContext(LAYOUT, plan)
    if verdict is None:
        assert admit(reply, context).update == sent
        return
    with pytest.raises(UpdateRejected) as caught:
        admit(reply, context)
    assert caught.value.verdict is verdict
