"""The gate: what an honest node sends passes whole; everything else has one verdict that says why."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import (
    GateContext,
    Layout,
    LowRank,
    UpdateRejected,
    Verdict,
    admit,
    decode,
    encode,
    gate,
    match_targets,
)
from aggregators.codec import METADATA_KEY, pack, unpack
from aggregators.shared_factors import shared_a

Q, UP, DOWN = (f"model.layers.0.{part}.weight" for part in ("q_proj", "up_proj", "down_proj"))
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
# Verdicts of the round loop: what never reached the gate, and what passed it.
NOT_OF_THE_GATE = {
    Verdict.ACCEPTED, Verdict.LATE, Verdict.FAILED, Verdict.MISSING, Verdict.REVOKED,
}  # fmt: skip
# Verdicts on what lives on probes (test_gate_of_probes.py).
OF_SIGNATURES = {Verdict.UNSIGNED, Verdict.FOREIGN_KEY, Verdict.FORGED}  # test_signatures.py
OF_PROBES = {Verdict.POOL, Verdict.WRONG_BASIS, Verdict.EMPTY, Verdict.OVERFLOW}
SEEDS = st.integers(0, 2**32)


def rejection(payload, context):
    with pytest.raises(UpdateRejected) as caught:
        admit(payload, context)
    return caught.value


@pytest.fixture(scope="session")
def context(layout, make_plan):
    """A maker of contexts: changes of the plan by name, of the context itself with ``gate``."""

    def make(gate: dict[str, Any] | None = None, **changes: Any) -> GateContext:
        return GateContext(layout, make_plan(**changes), **(gate or {}))

    return make


# What passes


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16", "int8"])
def test_an_honest_reply_passes(context, make_reply, low_rank, layout, dtype):
    asked = context(wire_dtype=dtype)
    update = low_rank(1, 4)
    reply = make_reply(update, asked.plan)
    admitted = admit(reply, asked)
    expected = decode(encode(update, dtype), layout)
    assert admitted.update == expected
    assert admitted.report.examples == 7
    _, tensors = unpack(reply)
    body = tensors["body"].numpy().tobytes()
    assert admitted.payload_digest == hashlib.sha256(body).hexdigest()
    assert gate(reply, asked) == expected


def test_an_evaluation_passes_without_an_update(context, make_reply):
    asked = context(action="evaluate")
    reply = make_reply(None, asked.plan)
    admitted = admit(reply, asked)
    assert admitted.update is None
    assert admitted.report.evaluation.tokens == 5
    with pytest.raises(UpdateRejected) as caught:
        gate(reply, asked)
    assert caught.value.verdict is Verdict.MALFORMED


@settings(max_examples=40)
@given(seed=SEEDS, rank=st.integers(1, 4), shared_seed=st.integers(0, 2**63 - 1))
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_fixed_a_is_put_back(context, make_reply, layout, dtype, seed, rank, shared_seed):
    """ffa-lora: only B travels, at any rank up to the plan's; the server knows the same A."""
    asked = context(train_a=False, shared_seed=shared_seed, wire_dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in (Q, UP, DOWN):
        rows, columns = layout.shape(name)
        a = shared_a(shared_seed, layout.tensor_id(name), rank, columns)
        factors[name] = (torch.randn(rows, rank, generator=generator), a, asked.plan.lora.scale)
    found = gate(make_reply(LowRank(layout, factors), asked.plan), asked)
    sent = decode(encode(LowRank(layout, factors), dtype), layout)
    for name, (_, a, _) in factors.items():
        assert torch.equal(found.factors[name].A, a)
        assert torch.equal(found.factors[name].B, sent.factors[name].B)
        assert torch.equal(found.factors[name].scale, sent.factors[name].scale)


@settings(max_examples=40)
@given(seed=SEEDS, rank=st.integers(1, 4))
def test_a_delta_has_twice_the_rank(context, make_reply, low_rank, seed, rank):
    """flexlora: the factors after training, stacked with those before, negated."""
    asked = context(sends="delta")
    after, before = low_rank(seed, rank), low_rank(seed + 1, rank)
    found = gate(make_reply(after - before, asked.plan), asked)
    assert set(found.ranks.values()) == {2 * rank}
    for name, change in found.dense().items():
        expected = after.dense()[name] - before.dense()[name]
        torch.testing.assert_close(change, expected, rtol=1e-10, atol=1e-10)


def test_a_delta_has_no_more_than_twice_the_rank(context, make_reply, low_rank):
    asked = context(sends="delta")
    assert admit(make_reply(low_rank(1, 8), asked.plan), asked).update == low_rank(1, 8)
    found = rejection(make_reply(low_rank(1, 9), asked.plan), asked)
    assert found.verdict is Verdict.RANK
    assert "9" in found.detail
    assert "8" in found.detail


def test_limits_are_inclusive(context, make_reply, low_rank):
    update = low_rank(1)
    reply = make_reply(update)
    norm = math.sqrt(update.squared_norm())
    limits = {"max_bytes": len(reply), "max_examples": 7}
    assert admit(reply, context(limits, max_norm=norm * (1 + 1e-12))).update == update


def test_replies_of_other_nodes_do_not_count_as_seen(context, make_reply, low_rank):
    asked = context({"seen_nonces": frozenset({"fedcba9876543210"})})
    assert admit(make_reply(low_rank(1)), asked).update == low_rank(1)


def test_clipping_sees_the_change_and_not_its_factors(context, make_reply, layout, low_rank):
    update = low_rank(1)
    norm = math.sqrt(update.squared_norm())
    stretched = LowRank(
        layout, {n: (1e6 * f.B, 1e-6 * f.A, f.scale) for n, f in update.factors.items()}
    )
    assert admit(make_reply(stretched), context(max_norm=1.001 * norm)).update == stretched
    assert rejection(make_reply(stretched), context(max_norm=0.999 * norm)).verdict is Verdict.NORM


# What does not, one case after the other


@dataclass(frozen=True)
class Case:
    """A forgery of an honest reply, the verdict that it gets, and what the detail names."""

    verdict: Verdict
    words: tuple[str, ...]
    envelope: Any = None
    body: Any = None
    plan: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None


def put(**fields):
    return lambda header, tensors: header.update(fields)


def in_report(**fields):
    return lambda header, tensors: header["report"].update(fields)


def tensor(part, value, name=Q):
    return lambda header, tensors: tensors.update({f"{name}#{part}": value})


def without(part, name=Q):
    return lambda header, tensors: tensors.pop(f"{name}#{part}")


def nothing(header, tensors):
    tensors.clear()


def wide(rank):
    def change(header, tensors):
        tensors[f"{Q}#B"], tensors[f"{Q}#A"] = torch.ones(6, rank), torch.ones(rank, 6)

    return change


def other_body(header, tensors):
    tensors["body"][-1] ^= 1


def no_safetensors(header, tensors):
    tensors["body"] = torch.zeros(20, dtype=torch.uint8)
    header["payload_digest"] = hashlib.sha256(bytes(20)).hexdigest()


def no_body(header, tensors):
    tensors.clear()
    header["payload_digest"] = ""


OVERFLOWING = torch.full((6, 2), 1e200, dtype=torch.float64)
V = Verdict
CASES = {
    "another run": Case(V.WRONG_RUN, ("b-run",), envelope=put(run="b-run")),
    "another round": Case(V.WRONG_ROUND, ("4", "3"), envelope=put(round=4)),
    "an earlier round": Case(V.STALE, ("2", "3"), envelope=put(round=2)),
    "an earlier round's, counted then": Case(
        V.REPLAYED, ("2", "3"), envelope=put(round=2, nonce="a" * 16),
        gate={"seen_nonces": frozenset({"a" * 16})}),
    "another question": Case(V.WRONG_ROUND, (), envelope=put(nonce="f" * 16)),
    "another node": Case(V.WRONG_NODE, ("laptop", "phone"), envelope=put(node="laptop")),
    "twice": Case(V.DUPLICATE, (), gate={"seen_nonces": frozenset({"0123456789abcdef"})}),
    "another layout": Case(V.WRONG_LAYOUT, ("000000",), envelope=put(layout="0" * 64)),
    "another layout inside": Case(V.WRONG_LAYOUT, ("000000",), body=put(layout="0" * 64)),
    "another base": Case(V.WRONG_BASE, ("000000",), envelope=put(base_digest="0" * 64)),
    "too large": Case(V.TOO_LARGE, ("100",), gate={"max_bytes": 100}),
    "too many examples": Case(V.WEIGHT, ("7", "6"), gate={"max_examples": 6}),
    "no examples": Case(V.WEIGHT, ("examples",), envelope=in_report(examples=0)),
    "negative examples": Case(V.WEIGHT, ("examples",), envelope=in_report(examples=-1)),
    "examples as text": Case(V.WEIGHT, ("examples",), envelope=in_report(examples="7")),
    "other bytes": Case(V.MALFORMED, ("digest",), envelope=other_body),
    "another digest": Case(V.MALFORMED, ("digest",), envelope=put(payload_digest="0" * 64)),
    "body of zeros": Case(V.MALFORMED, (), envelope=no_safetensors),
    "no body": Case(V.MALFORMED, (), envelope=no_body),
    "no update": Case(V.MALFORMED, ("no tensor",), body=nothing),
    "another schema": Case(V.MALFORMED, ("schema",), body=put(schema=9)),
    "part missing": Case(V.MALFORMED, (Q, "B"), body=without("B")),
    "A missing": Case(V.MALFORMED, (Q, "A"), body=without("A")),
    "scale missing": Case(V.MALFORMED, (Q, "scale"), body=without("scale")),
    "part unknown": Case(V.MALFORMED, (Q, "C"), body=tensor("C", torch.ones(1))),
    "fixed A sent": Case(
        V.MALFORMED, (Q, "A"), plan={"train_a": False}, body=tensor("A", torch.ones(2, 6))),
    "another family": Case(V.WRONG_FAMILY, ("dense", "low_rank"), body=put(family="dense")),
    "no family": Case(V.WRONG_FAMILY, ("None",), body=put(family=None)),
    "update for an evaluation": Case(V.WRONG_FAMILY, ("evaluation",), plan={"action": "evaluate"}),
    "unknown tensor": Case(
        V.UNKNOWN_TENSOR, ("'other'",), body=tensor("B", torch.ones(6, 2), "other")),
    "not asked for": Case(
        V.UNKNOWN_TENSOR, (EMBED, "plan"), body=tensor("B", torch.ones(11, 2), EMBED)),
    "a vector": Case(V.UNKNOWN_TENSOR, (NORM,), body=tensor("B", torch.ones(6, 2), NORM)),
    "a number": Case(
        V.UNKNOWN_TENSOR, ("temperature",), plan={"train_a": False},
        body=tensor("B", torch.ones(6, 2), "temperature")),
    "rows": Case(V.SHAPE, (Q,), body=tensor("B", torch.ones(5, 2))),
    "columns": Case(V.SHAPE, (Q,), body=tensor("A", torch.ones(2, 5))),
    "ranks differ": Case(V.SHAPE, (Q,), body=tensor("A", torch.ones(3, 6))),
    "rank 0": Case(V.SHAPE, (Q, "0"), body=wide(0)),
    "scales": Case(V.SHAPE, (Q, "3"), body=tensor("scale", torch.ones(3, dtype=torch.float64))),
    "integers": Case(V.DTYPE, (Q, "int32"), body=tensor("B", torch.ones(6, 2).int())),
    "scale's type": Case(V.DTYPE, (Q,), body=tensor("scale", torch.ones(1))),
    "int8 unscaled": Case(V.DTYPE, (Q,), body=tensor("B", torch.ones(6, 2).to(torch.int8))),
    "another wire type": Case(
        V.DTYPE, (Q, "float32", "float16"), plan={"wire_dtype": "float16"},
        body=tensor("B", torch.ones(6, 2))),
    "rank 5": Case(V.RANK, (Q, "rank 5", "4"), body=wide(5)),
    "rank of a fixed A": Case(
        V.RANK, (Q, "rank 5", "4"), plan={"train_a": False}, body=tensor("B", torch.ones(6, 5))),
    "NaN": Case(V.NOT_FINITE, (Q,), body=tensor("B", torch.full((6, 2), math.nan))),
    "float16 NaN": Case(V.NOT_FINITE, (Q,), body=tensor("B", torch.full((6, 2), math.nan).half())),
    "infinite": Case(V.NOT_FINITE, (Q,), body=tensor("A", torch.full((2, 6), math.inf))),
    "scale NaN": Case(
        V.NOT_FINITE, (Q,), body=tensor("scale", torch.tensor([math.nan], dtype=torch.float64))),
    "int8 scales NaN": Case(
        V.NOT_FINITE, (Q,), plan={"wire_dtype": "int8"},
        body=tensor("B.s", torch.tensor([[1.0, math.nan]]))),
    "another view": Case(V.DIVERGED, ("view",), gate={"view": "a" * 64}),
    "norm overflows": Case(V.NOT_FINITE, ("norm",), body=tensor("B", OVERFLOWING)),
    "loss overflows": Case(V.MALFORMED, ("train_loss",), envelope=in_report(train_loss=1e300)),
    "above the norm": Case(V.NORM, ("0.5",), plan={"max_norm": 0.5}),
    "absurd norm": Case(V.NORM, ("norm",), body=tensor("B", torch.full((6, 2), 1e30))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_verdicts(context, make_reply, low_rank, forge, case):
    asked = context(case.gate, **(case.plan or {}))
    honest = make_reply(low_rank(1), asked.plan)
    payload = forge(honest, envelope=case.envelope, body=case.body)
    found = rejection(payload, asked)
    assert found.verdict is case.verdict
    assert all(word in found.detail for word in case.words), found.detail
    with pytest.raises(UpdateRejected):
        gate(payload, asked)


def test_every_verdict_of_the_gate_is_reached():
    elsewhere = NOT_OF_THE_GATE | OF_PROBES | OF_SIGNATURES
    assert {case.verdict for case in CASES.values()} == set(Verdict) - elsewhere


def test_a_loss_that_is_not_finite(context, make_reply, low_rank, raw):
    payload = make_reply(low_rank(1))
    header, _ = unpack(payload)
    header["envelope"]["report"]["train_loss"] = "HERE"
    inner = json.dumps(header).replace('"HERE"', "1e999")
    found = rejection(raw({"__metadata__": {METADATA_KEY: inner}}), context())
    assert found.verdict is Verdict.NOT_FINITE
    assert "train_loss" in found.detail


def test_factors_are_of_every_tensor_that_the_plan_adapts(context, make_reply, low_rank):
    found = rejection(make_reply(low_rank(1, names=(Q,))), context())
    assert found.verdict is Verdict.SHAPE


def test_a_loud_change_does_not_hide_behind_one_that_cancels(context, make_reply, layout, low_rank):
    """Gram matrices of inf - inf are NaN, and NaN is no norm that a limit could pass."""
    b = torch.zeros(6, 2, dtype=torch.float64)
    b[0] = 1e200
    a = torch.zeros(2, 6, dtype=torch.float64)
    a[0, 0], a[1, 0], a[1, 1] = 1.0, -1.0, 1.0
    hidden = LowRank(layout, {Q: (b, a, 1.0)})
    hidden += low_rank(1, names=[name for name in low_rank().factors if name != Q])
    for limit in (None, 1.0):
        found = rejection(make_reply(hidden), context(max_norm=limit))
        assert found.verdict is Verdict.NOT_FINITE


def test_the_cheapest_check_comes_first(context, make_reply, low_rank, forge):
    """A reply that is wrong in everything is told what costs least to find."""

    def everything(header, tensors):
        header.update(run="b-run", round=9, node="laptop", nonce="f" * 16, layout="0" * 64)
        other_body(header, tensors)

    payload = forge(make_reply(low_rank(1)), envelope=everything)
    assert rejection(payload, context({"max_bytes": 10})).verdict is Verdict.TOO_LARGE
    assert rejection(payload, context()).verdict is Verdict.WRONG_RUN


# Any bytes at all

PLANS = st.sampled_from(
    [{}, {"train_a": False}, {"sends": "delta"}, {"action": "evaluate"}, {"wire_dtype": "int8"},
     {"train_a": False, "wire_dtype": "int8"}, {"max_norm": 1.0},
     {"target_modules": ("all-linear",)}, {"target_modules": ("norm", "embed_tokens")}]
)  # fmt: skip
PARTS = st.sampled_from(["B", "A", "scale", "B.s", "A.s", "D", "", "#B"])
NAMES = st.sampled_from([Q, UP, DOWN, EMBED, NORM, "temperature", "other", ""])
DTYPES = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.int8, torch.int64, torch.bool,
     torch.complex64, torch.float8_e5m2, torch.uint8]
)  # fmt: skip


def outcome(read, *arguments):
    """What ``read`` returns and None, or None and its refusal; anything else fails the test."""
    try:
        return read(*arguments), None
    except UpdateRejected as rejection:
        return None, rejection


def admitted_or_refused(payload, asked):
    admitted, found = outcome(admit, payload, asked)
    if found is not None:
        assert found.verdict not in NOT_OF_THE_GATE
        assert found.detail
        assert found.detail.isprintable()
        return
    if admitted.update is not None:
        assert math.isfinite(admitted.update.squared_norm())
        assert set(admitted.update.factors) <= set(
            match_targets(asked.layout, asked.plan.lora.target_modules)
        )


@given(data=st.binary(max_size=100), plan=PLANS)
def test_random_bytes(context, data, plan):
    assert rejection(data, context(**plan)).verdict is Verdict.MALFORMED


@settings(max_examples=300)
@given(choices=st.data(), plan=PLANS)
def test_forged_bodies_pass_or_are_refused(context, make_reply, low_rank, forge, choices, plan):
    asked = context(**plan)

    def change(header, tensors):
        for _ in range(choices.draw(st.integers(1, 3))):
            key = f"{choices.draw(NAMES)}#{choices.draw(PARTS)}"
            if choices.draw(st.integers(0, 3)) == 0:
                tensors.pop(key, None)
                continue
            shape = choices.draw(st.lists(st.sampled_from([0, 1, 2, 4, 6, 9]), max_size=3))
            value = choices.draw(st.sampled_from([0.0, 1.0, -127.0, 1e30, math.nan]))
            tensors[key] = torch.full(shape, value, dtype=torch.float64).to(choices.draw(DTYPES))

    admitted_or_refused(forge(make_reply(low_rank(1, 2), asked.plan), body=change), asked)


@settings(max_examples=300)
@given(choices=st.data(), plan=PLANS)
def test_damaged_replies_pass_or_are_refused(context, make_reply, low_rank, choices, plan):
    asked = context(**plan)
    data = bytearray(make_reply(low_rank(1, 2), asked.plan))
    for _ in range(choices.draw(st.integers(1, 4))):
        at = choices.draw(st.integers(0, len(data) - 1))
        data[at] ^= 1 << choices.draw(st.integers(0, 7))
    if choices.draw(st.booleans()):
        del data[choices.draw(st.integers(0, len(data))) :]
    admitted_or_refused(bytes(data), asked)


@settings(max_examples=200)
@given(choices=st.data(), plan=PLANS)
def test_damaged_bodies_under_a_fitting_digest(context, make_reply, low_rank, choices, plan):
    """The forger's digest fits, so the damage reaches the parser of the body."""
    asked = context(**plan)
    header, tensors = unpack(make_reply(low_rank(1, 2), asked.plan))
    body = bytearray(tensors["body"].numpy().tobytes())
    for _ in range(choices.draw(st.integers(1, 3))):
        at = choices.draw(st.integers(0, len(body) - 1))
        body[at] = choices.draw(st.integers(0, 255))
    header["envelope"]["payload_digest"] = hashlib.sha256(body).hexdigest()
    payload = pack(header, {"body": torch.frombuffer(body, dtype=torch.uint8)})
    admitted_or_refused(payload, asked)


# Which tensors a plan means


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], [Q]),
        (["down_proj", "q_proj"], [Q, DOWN]),
        (["layers.0.up_proj"], [UP]),
        (["proj"], []),
        (["all-linear"], [Q, UP, DOWN]),
        (["all-linear", "embed_tokens"], [EMBED, Q, UP, DOWN]),
        (["norm"], []),
        ([], []),
    ],
)
def test_targets(layout, targets, expected):
    assert match_targets(layout, targets) == expected


def test_all_linear_leaves_heads_and_embeddings_out():
    names = ["wte", "wpe", "h.0.attn.c_attn", "h.0.mlp.c_fc", "ln_f", "lm_head"]
    layout = Layout({f"{name}.weight": (4, 4) for name in names})
    found = match_targets(layout, ["all-linear"])
    assert "h.0.attn.c_attn.weight" in found
    assert not any(name.startswith(("wte", "wpe", "lm_head")) for name in found)
