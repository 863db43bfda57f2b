"""The gate for edges: a sum passes only if members, weights and numbers are those of its plan."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import (
    Basis,
    GateContext,
    Layout,
    LowRank,
    ProjectedGradient,
    SeedScalars,
    Sketch,
    UpdateRejected,
    Verdict,
    admit,
    aggregate,
    gate,
)
from aggregators.codec import pack, unpack
from aggregators.cohort import Cohort, CohortMember
from aggregators.cohort_codec import cohort_parts, read_cohort
from aggregators.gate import norm_of
from aggregators.messages import Plan, Report, encode_reply
from aggregators.totals import Total
from simulations.benchmarks.specimens import forge

FIRST, SECOND = "layers.0.up.weight", "layers.1.up.weight"
LAYOUT = Layout({"embed": (5, 4), FIRST: (12, 10), "norm": (4,), SECOND: (10, 12)})
MASTER_SEED, POOL = 20, 64
BASIS = Basis.random(LAYOUT, [FIRST, "norm"], 5, 2, 1)
MAX_NORM = 10.0

SCALARS: dict[str, Any] = {
    "family": "seed_scalars", "epsilon": 1e-3, "clip": None, "master_seed": MASTER_SEED,
    "pool_size": POOL, "probe": "rademacher",
}  # fmt: skip
LORA: dict[str, Any] = {
    "family": "low_rank", "target_modules": ("up",), "rank": 2, "alpha": 2.0, "rslora": False,
    "dropout": 0.0, "init": "random", "train_a": True, "start": "fresh", "sends": "factors",
    "shared_seed": 1, "weight_decay": 0.0, "warmup_steps": 0,
}  # fmt: skip
PROJECTED: dict[str, Any] = {
    "family": "projected_gradient", "target_modules": (), "master_seed": 9, "probe": "rademacher",
    "coordinates": {FIRST: 5, SECOND: 3}, "optimiser": "sgd", "error_feedback": False,
}  # fmt: skip
SKETCHED: dict[str, Any] = {
    "family": "sketch", "target_modules": (), "master_seed": 5, "optimiser": "sgd",
    "error_feedback": False, "rank": 2, "oversampling": 1,
}  # fmt: skip


def numbers(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def seed_scalars(seed: int) -> SeedScalars:
    indices = sorted({(seed * 7 + step * 11) % POOL for step in range(seed % 9 + 1)})
    return SeedScalars(LAYOUT, MASTER_SEED, POOL, indices, numbers(seed, len(indices)) * 1e-3)


def low_rank(seed: int, names: Sequence[str] = (FIRST, SECOND)) -> LowRank:
    shapes = {name: LAYOUT.shape(name) for name in names}
    return LowRank(
        LAYOUT,
        {
            name: (numbers(seed, rows, 2).float(), numbers(seed + 1, 2, columns).float(), 1e-3)
            for name, (rows, columns) in shapes.items()
        },
    )


def projected(seed: int, **counts: int) -> ProjectedGradient:
    return ProjectedGradient(
        LAYOUT, 9, {name: numbers(seed, k) * 1e-3 for name, k in PROJECTED["coordinates"].items()}
    )


def sketch(seed: int) -> Sketch:
    change = {FIRST: numbers(seed, *LAYOUT.shape(FIRST)), "norm": numbers(seed, 4)}
    return Sketch.of(LAYOUT, BASIS, change) * 1e-3


def plan(
    *groups: tuple[dict[str, Any], Sequence[str]], evaluates: Sequence[str] = (), **changes: Any
) -> Plan:
    """An edge's, whose devices n0 and n1 walk along seeds where no groups are given."""
    asked = [("train", *group) for group in groups or [(SCALARS, ("n0", "n1"))]]
    asked += [("evaluate", SCALARS, evaluates)] if evaluates else []
    described = [
        {
            "action": action, "method": method, "local_steps": 20, "batch_size": 1,
            "wire_dtype": None, "learning_rate": 1e-3, "base_format": "full", "view": "",
            "sent": "c" * 64, "members": [[name, "0" * 32, 1] for name in names],
        }
        for action, method, names in asked
    ]  # fmt: skip
    return Plan.model_validate(
        {
            "run": "run", "round": 1, "node": "edge", "nonce": "2" * 32, "base_model": "none",
            "layout": LAYOUT.fingerprint, "base_digest": "d" * 64, "action": "train",
            "preset": "mixed", "method": {"family": "cohort", "groups": described}, "seed": 3,
            "local_steps": 1, "batch_size": 1, "learning_rate": 1e-3, "max_length": 64,
            "dtype": "float32", "wire_dtype": None, "threads": 1, "accelerate": False,
            "evaluate": False, "deadline_seconds": 60.0, "max_norm": MAX_NORM,
        } | changes
    )  # fmt: skip


def member(name: str, examples: int, **more: Any) -> CohortMember:
    told = {"node": name, "verdict": Verdict.ACCEPTED, "examples": examples, "payload": "a" * 64}
    return CohortMember.model_validate(told | more)


def answered(updates: Sequence[Any], asked: Plan, **report: Any) -> bytes:
    """An honest edge's answer for devices that have one example, two, and so on."""
    members = [member(f"n{n}", n + 1, norm=norm_of(one)) for n, one in enumerate(updates)]
    cohort = Cohort.of([(one, n + 1) for n, one in enumerate(updates)], members)
    return replied(cohort, sum(m.examples for m in members), asked, **report)


def replied(cohort: Cohort, examples: int, asked: Plan, **report: Any) -> bytes:
    return encode_reply(
        run=asked.run, round=1, node="edge", nonce=asked.nonce, layout=asked.layout,
        base_digest=asked.base_digest, report=Report(examples=examples, **report), update=cohort,
        dtype=None,
    )  # fmt: skip


def judged(reply: bytes, asked: Plan) -> Cohort:
    found = admit(reply, GateContext(LAYOUT, asked, basis=BASIS)).update
    assert isinstance(found, Cohort)
    return found


def verdict(reply: bytes, asked: Plan) -> Verdict:
    with pytest.raises(UpdateRejected) as refused:
        judged(reply, asked)
    return refused.value.verdict


def test_the_gate_admits_the_sum_of_those_that_were_asked() -> None:
    asked = plan()
    reply = answered([seed_scalars(5), seed_scalars(8)], asked)
    judged(reply, asked)
    with pytest.raises(UpdateRejected) as refused:
        gate(reply, GateContext(LAYOUT, asked))
    assert refused.value.verdict is Verdict.WRONG_FAMILY


@pytest.mark.parametrize(
    ("updates", "members", "examples", "expected"),
    [
        ([(seed_scalars(5), 3)], [member("n0", 3)], 3, Verdict.WRONG_NODE),
        ([(seed_scalars(5), 3)], [member("n0", 1), member("evil", 2)], 3, Verdict.WRONG_NODE),
        ([(seed_scalars(5), 9)], [member("n0", 1), member("n1", 2)], 3, Verdict.WEIGHT),
        ([(seed_scalars(5), 3)], [member("n0", 1), member("n1", 2)], 4, Verdict.WEIGHT),
        ([(seed_scalars(5), 2)], [member("n0", 0), member("n1", 2)], 2, Verdict.WEIGHT),
        ([(low_rank(5), 3)], [member("n0", 1), member("n1", 2)], 3, Verdict.WRONG_FAMILY),
        ([(seed_scalars(5) * 1e6, 3)], [member("n0", 1), member("n1", 2)], 3, Verdict.NORM),
        ([(seed_scalars(5) * 0.0, 3)], [member("n0", 1), member("n1", 2)], 3, Verdict.EMPTY),
        ([(seed_scalars(5), 3)], [member("n0", 1, payload=""), member("n1", 2)], 3,
         Verdict.MALFORMED),
        ([(SeedScalars(LAYOUT, MASTER_SEED + 1, POOL, [1], [0.5]), 3)],
         [member("n0", 1), member("n1", 2)], 3, Verdict.POOL),
    ],
)  # fmt: skip
def test_the_gate_refuses_what_no_plan_asked_for(
    updates: list[Any], members: list[CohortMember], examples: int, expected: Verdict
) -> None:
    assert verdict(replied(Cohort.of(updates, members), examples, plan()), plan()) is expected


def test_whoever_is_in_a_cohort_is_in_a_total_and_whoever_evaluates_is_not() -> None:
    """A family of members that is missing would count for the quorum, and for its examples."""
    asked = plan((SCALARS, ["n0"]), (LORA, ["n1"]))
    members = [member("n0", 1), member("n1", 10**6)]
    alone = Cohort.of([(seed_scalars(5), 1)], members)
    assert verdict(replied(alone, 1 + 10**6, asked), asked) is Verdict.MALFORMED
    asked = plan((SCALARS, ["n0"]), evaluates=["n1"])
    found = Cohort.of([(seed_scalars(5), 1)], [member("n0", 1), member("n1", 1)])
    assert verdict(replied(found, 1, asked), asked) is Verdict.WRONG_FAMILY
    found = Cohort.of([(seed_scalars(5), 1)], [member("n0", 1), member("n1", 1, payload="")])
    assert judged(replied(found, 1, asked), asked).accepted == 1


@pytest.mark.parametrize("weight", [5e-324, 1e-9, 0, 0.5, 2.5, -3, True, None, "3", 1e300, 10**14])
@pytest.mark.parametrize("place", ["weight", "held"])
def test_weights_are_sums_of_counts_of_examples(place: str, weight: Any) -> None:
    asked = plan((PROJECTED | {"subset": "hft"}, ["n0", "n1"]))

    def damage(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        total = header["totals"][0]
        if place == "weight":
            total["weight"] = weight
        else:
            total["held"] = [[LAYOUT.tensor_id(FIRST), weight]]

    reply = forge(answered([projected(1), projected(2)], asked), body=damage)
    assert verdict(reply, asked) is Verdict.WEIGHT


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((0, 10**13), torch.int32), ((0, 4), torch.int32), ((10, 8), torch.int32), ((8,), torch.int32),
     ((1, 9), torch.int32), ((1, 10**6), torch.int32), ((1, 8), torch.int64), ((), torch.int32)],
)  # fmt: skip
@pytest.mark.parametrize("method", [PROJECTED, SCALARS, SKETCHED], ids=lambda m: m["family"])
def test_digits_are_of_the_numbers_that_the_form_has(
    method: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    asked = plan((method, ["n0"]))
    update = {"seed_scalars": seed_scalars(5), "sketch": sketch(5)}.get(
        method["family"], projected(1)
    )

    def damage(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["0.digits"] = torch.ones(shape, dtype=dtype)

    found = verdict(forge(answered([update], asked), body=damage), asked)
    assert found in (Verdict.SHAPE, Verdict.MALFORMED)


@pytest.mark.parametrize(
    "told",
    [{"bytes_up": 10**13}, {"bytes_down": 10**400}, {"norm": 1e300}, {"train_loss": 1e300},
     {"train_loss": -1.0}, {"bytes_up": "3"}, {"examples": True}, {"node": "\ud800"},
     {"reason": "\ud800"}, {"more": 1}],
)  # fmt: skip
def test_what_is_said_of_members_is_bounded(told: dict[str, Any]) -> None:
    reply = forge(
        answered([seed_scalars(5), seed_scalars(8)], plan()),
        body=lambda header, tensors: header["members"][0].update(told),
    )
    assert verdict(reply, plan()) is Verdict.MALFORMED


@pytest.mark.parametrize("method", [LORA, PROJECTED, SKETCHED], ids=lambda m: m["family"])
@pytest.mark.parametrize("held", [1, 2])
def test_a_tensor_that_every_plan_reaches_is_every_members(
    method: dict[str, Any], held: int
) -> None:
    """Of too little weight it would be scaled up as if few had it."""
    asked = plan((method, ["n0", "n1"]))
    make = {"low_rank": low_rank, "projected_gradient": projected, "sketch": sketch}
    updates = [make[method["family"]](seed) for seed in (1, 2)]
    reply = answered(updates, asked)
    judged(reply, asked)

    def damage(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        header["totals"][0]["held"] = [[LAYOUT.tensor_id(FIRST), held]]

    assert verdict(forge(reply, body=damage), asked) is Verdict.WEIGHT


def test_a_sketch_is_of_every_tensor_of_the_basis_or_of_a_subset() -> None:
    seen = sketch(1)
    part = Sketch(
        LAYOUT, BASIS.digest, {name: (view.P, view.R) for name, view in seen.views.items()}
    )
    whole, free = (plan((SKETCHED | {"subset": kind}, ["n0", "n1"])) for kind in ("all", "hft"))
    reply = answered([part, seen], whole)
    assert verdict(reply, whole) is Verdict.WEIGHT
    assert judged(reply, free).totals[0].held == {FIRST: 3, "norm": 2}


def test_members_of_unlike_tensors_are_no_longer_together_than_each_alone() -> None:
    """The mean of each tensor is over those that have it, so that the whole is longer than they."""
    one, two = (
        ProjectedGradient(LAYOUT, 9, {name: values})
        for name, values in projected(1).coordinates.items()
    )
    one, two = (update * (0.99 * MAX_NORM / norm_of(update)) for update in (one, two))
    asked = plan((PROJECTED | {"subset": "hft"}, ["n0", "n1"]))
    reply = answered([one, two], asked)
    assert norm_of(judged(reply, asked)) > MAX_NORM
    assert verdict(answered([one * 3.0, two * 3.0], asked), asked) is Verdict.NORM
    total = Total.of(one, 100)
    lied = Total(total.form, 100, total.numbers, {FIRST: 1})
    cohort = Cohort([lied], [member("n0", 50), member("n1", 50)])
    assert verdict(replied(cohort, 100, asked), asked) is Verdict.NORM


@pytest.mark.parametrize("ratio", [1.0, 1.01])
def test_members_at_the_limit_are_within_it_together(ratio: float) -> None:
    """Of six stacks of rank 2 the edge sends what float32 holds of their decomposition."""
    names = [f"n{n}" for n in range(6)]
    update = low_rank(1) * ratio
    asked = plan((LORA, names), max_norm=norm_of(low_rank(1)))
    reply = answered([update] * 6, asked)
    if ratio == 1.0:
        judged(reply, asked)
    else:
        assert verdict(reply, asked) is Verdict.NORM


@pytest.mark.parametrize(
    ("method", "update"),
    [(SCALARS, seed_scalars(5)), (LORA, low_rank(5)), (SKETCHED, sketch(5)),
     (PROJECTED, projected(5))],
    ids=lambda value: getattr(value, "family", ""),
)  # fmt: skip
def test_members_that_cancel_out_are_a_change_of_nothing(method: Any, update: Any) -> None:
    asked = plan((method, ["n0", "n1"]))
    members = [member(name, 1, norm=norm_of(update)) for name in ("n0", "n1")]
    cohort = Cohort.of([(update, 1), (update * -1.0, 1)], members)
    assert norm_of(judged(replied(cohort, 2, asked), asked)) <= 1e-6 * norm_of(update)
    silent = Cohort.of([(update * 0.0, 1)] * 2, [member("n0", 1), member("n1", 1)])
    assert verdict(replied(silent, 2, asked), asked) is Verdict.EMPTY
    judged(replied(silent, 2, asked, unchanged=True), asked)
    assert verdict(replied(cohort, 2, asked, unchanged=True), asked) is Verdict.MALFORMED


def test_sketches_of_steps_within_the_basis_are_read_as_such() -> None:
    """Free ones are guessed from a random basis, and the guess is longer here."""
    update = sketch(3)
    lengths = [
        math.sqrt(update.reconstruct(BASIS, within).squared_norm()) for within in (True, False)
    ]
    within, free = (max(length, norm_of(update)) for length in lengths)
    assert within < free
    for allowed in (True, False):
        asked = plan((SKETCHED | {"within": allowed}, ["n0"]), max_norm=(within + free) / 2)
        reply = answered([update], asked)
        if allowed:
            judged(reply, asked)
        else:
            assert verdict(reply, asked) is Verdict.NORM


MIXED = plan(
    (SCALARS, ["n0"]), (LORA, ["n1", "n2"]), (PROJECTED | {"subset": "hft"}, ["n3"]), (SKETCHED, ["n4"])
)  # fmt: skip
HONEST = answered([seed_scalars(5), low_rank(1), low_rank(2), projected(3), sketch(4)], MIXED)
ODD = st.sampled_from(
    [0, 1, 2, 3, 5, 9, -1, True, None, "", "3", 5e-324, 1e-9, 0.5, 5.0, 1e13, 1e300, 2**31, 10**13,
     10**400, [], {}, [1], [[0, 1]], [[1, 1], [3, 2]], [[1, 5e-324]], "accepted", "missing", "n0",
     "a" * 64, "\ud800"]
)  # fmt: skip
SHAPES = st.just([0, 10**13]) | st.lists(st.sampled_from([0, 1, 2, 3, 8, 9, 10, 12]), max_size=3)
TYPES = st.sampled_from([torch.int32, torch.int64, torch.float32, torch.float64, torch.uint8])


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every field of a header, and every element of its lists, with what holds it."""
    keys = range(len(value)) if isinstance(value, list) else value
    for key in keys if isinstance(value, dict | list) else ():
        yield value, key
        yield from places(value[key])


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_cohort_is_refused_or_sound(data: st.DataObject) -> None:
    def damage(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        for kind in data.draw(st.lists(st.sampled_from(["field", "gone", "twice", "tensor", "value"]),
                                       min_size=1, max_size=3)):  # fmt: skip
            name = data.draw(st.sampled_from(sorted(tensors)))
            holder, key = data.draw(st.sampled_from(list(places(header)) or [(header, "totals")]))
            if kind == "field":
                holder[key] = copy.deepcopy(data.draw(ODD))
            elif kind == "gone":
                holder.pop(key, None) if isinstance(holder, dict) else holder.pop(key)
            elif kind == "twice" and isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            elif kind == "tensor":
                tensors[name] = torch.ones(data.draw(SHAPES), dtype=data.draw(TYPES))
            elif kind == "value" and tensors[name].numel():
                whole = not tensors[name].is_floating_point()
                chosen = [0, 1, 100, 255] if whole else [0.0, 1.0, -1e-3, 1e300, math.inf, math.nan]
                place = data.draw(st.integers(0, tensors[name].numel() - 1))
                number = torch.tensor(data.draw(st.sampled_from(chosen)))
                tensors[name].view(-1)[place] = number.to(tensors[name].dtype)

    reply = forge(HONEST, body=damage)
    try:
        found = judged(reply, MIXED)
    except UpdateRejected:
        return
    assert {m.node for m in found.members} == {f"n{n}" for n in range(5)}
    for total in found.totals:
        assert total.weight == int(total.weight) >= 1
        assert all(1 <= held <= total.weight for held in total.held.values())
    assert norm_of(found) <= MAX_NORM * math.sqrt(2) * len(found.totals)
    again = read_cohort(*unpack(pack(*cohort_parts(found))), LAYOUT)
    mixed = aggregate([(again, 15), (seed_scalars(3), 2)], LAYOUT)
    assert all(bool(change.isfinite().all()) for change in mixed.dense().values())
