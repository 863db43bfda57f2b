"""What goes over the wire comes back equal, and what is not a message is refused."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import Layout, SeedScalars, UpdateRejected, Verdict, decode, encode
from aggregators.bit_packing import pack_bits
from aggregators.codec import METADATA_KEY, pack, unpack
from aggregators.messages import (
    Capabilities,
    Evaluation,
    Plan,
    Report,
    decode_plan,
    encode_plan,
    open_reply,
)
from aggregators.probe_sum import ProbeSum
from aggregators.shared_factors import shared_a
from aggregators.view import View

Q = "model.layers.0.q_proj.weight"
SEEDS = st.integers(0, 2**63 - 1)
ODD = st.sampled_from(
    [None, True, -1, 0, 1, 2**70, 1.5, -1e308, "", "x", "\ud800", "\x1b[2J", "9" * 5000, [], {},
     [[]], {"a": {}}, [1, "a", None], "NaN", "0" * 64]
)  # fmt: skip


def replaced(draw, value):
    """``value`` with one part of it, at any depth, replaced, removed or doubled."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.sampled_from(["inside", "inside", "remove", "rename"]))
        if kind == "inside":
            return value | {key: replaced(draw, value[key])}
        rest = {k: v for k, v in value.items() if k != key}
        return rest if kind == "remove" else rest | {f"{key}\ud800": value[key]}
    if isinstance(value, list) and value and draw(st.booleans()):
        return [replaced(draw, value[0]), *value]
    return draw(ODD)


def outcome(read, *arguments):
    """What ``read`` returns and None, or None and its refusal; anything else fails the test."""
    try:
        return read(*arguments), None
    except UpdateRejected as rejection:
        return None, rejection


def damaged(choices, data):
    """A reply or plan with its JSON changed, and then perhaps its bytes."""
    header, tensors = unpack(data)
    if choices.draw(st.booleans()):
        header = replaced(choices.draw, header)
    if tensors and choices.draw(st.booleans()):
        key = choices.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(key)
        change = choices.draw(st.sampled_from(["drop", "dtype", "empty", "number", "name", "cut"]))
        if change == "dtype":
            dtypes = [torch.int8, torch.bool, torch.float16, torch.int64, torch.complex64]
            tensors[key] = tensor.to(choices.draw(st.sampled_from(dtypes)))
        elif change == "empty":
            tensors[key] = tensor[:0]
        elif change == "number":
            tensors[key] = tensor.flatten()[0].clone()
        elif change == "name":
            tensors[choices.draw(st.sampled_from(["", "#B", "#", "body", "a#B"]))] = tensor
        elif change == "cut":
            tensors[key] = tensor[: len(tensor) // 2]
    content = bytearray(pack(header, tensors))
    for _ in range(choices.draw(st.integers(0, 2))):
        at = choices.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << choices.draw(st.integers(0, 7))
    return bytes(content[: choices.draw(st.just(len(content)) | st.integers(0, len(content)))])


# Plans


@given(
    rank=st.integers(1, 512),
    alpha=st.floats(1e-3, 1e3),
    rslora=st.booleans(),
    seed=SEEDS,
    threads=st.none() | st.integers(1, 64),
)
def test_a_plan_comes_back_equal(make_plan, layout, rank, alpha, rslora, seed, threads):
    plan = make_plan(rank=rank, alpha=alpha, rslora=rslora, seed=seed, threads=threads)
    found, sealed = decode_plan(encode_plan(plan, View(), None))
    assert (found, sealed.read(layout)) == (plan, View())
    assert encode_plan(plan, View(), None) == encode_plan(plan.model_copy(), View(), None)
    assert plan.lora.scale == pytest.approx(alpha / (rank**0.5 if rslora else rank))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16", "int8"])
def test_a_view_comes_back_as_the_codec_reads_it(make_plan, low_rank, layout, dtype):
    view = low_rank(1, 3, [0.5, 1.0, 2.0])
    plan, sealed = decode_plan(encode_plan(make_plan(), View(view), dtype))
    factors = sealed.read(layout).factors()
    expected = decode(encode(view, dtype), layout)
    assert plan == make_plan()
    assert factors.keys() == view.factors.keys()
    for name, (b, a, scale) in factors.items():
        assert (b.dtype, a.dtype, scale.dtype) == (torch.float32, torch.float32, torch.float64)
        assert torch.equal(b, expected.factors[name].B.float())
        assert torch.equal(a, expected.factors[name].A.float())
        assert torch.equal(scale, expected.factors[name].scale)


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 0}, {"rank": 0}, {"rank": 1.5}, {"alpha": 0.0}, {"alpha": math.inf},
        {"nonce": "short"}, {"layout": "no digest"}, {"family": "dense"}, {"action": "rest"},
        {"dropout": 1.0}, {"seed": -1}, {"seed": 2**63}, {"learning_rate": math.nan},
        {"surprise": 1}, {"node": ""},
    ],
)  # fmt: skip
def test_impossible_plans_are_value_errors(make_plan, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        make_plan(**changes)


def plan_bytes(asked, view, tensors, **changes):
    header = {"schema": 1, "plan": asked.model_dump(mode="json"), "view": view} | changes
    return pack(header, tensors)


LOW_RANK = {"adapter": {"schema": 1, "family": "low_rank"}}
SUM = {"seed": 1, "probe": "rank1", "exponent": -9, "sizes": [2], "bits": 2}
TOTALS = {"sums.0.totals": pack_bits(torch.tensor([1, -2]), 2)}


def factors(b, a):
    return {f"adapter.{Q}#B": b, f"adapter.{Q}#A": a, f"adapter.{Q}#scale": torch.ones(1).double()}


@pytest.mark.parametrize(
    ("view", "tensors", "changes"),
    [
        ([], {}, {}),
        (None, {}, {}),
        (7, {}, {}),
        ({"adapter": 7}, {}, {}),
        ({"adapter": {}}, {}, {}),
        ({"adapter": {"schema": 1, "family": "dense"}}, {}, {}),
        (LOW_RANK, factors(torch.ones(6, 2), torch.ones(3, 6)), {}),
        (LOW_RANK, factors(torch.ones(()), torch.ones(2, 6)), {}),
        (LOW_RANK, factors(torch.ones(6, 2), torch.ones(6)), {}),
        (LOW_RANK, factors(torch.ones(0, 2), torch.ones(2, 6)), {}),
        (LOW_RANK, {f"adapter.{Q}#A": torch.ones(2, 6)}, {}),
        ({"sums": 7}, {}, {}),
        ({"sums": [7]}, TOTALS, {}),
        ({"sums": [SUM]}, {}, {}),
        ({"sums": [SUM | {"sizes": [5]}]}, TOTALS, {}),
        ({"sums": [SUM | {"sizes": []}]}, TOTALS, {}),
        ({"sums": [SUM | {"sizes": [10**15]}]}, TOTALS, {}),
        ({"sums": [SUM | {"bits": 33}]}, TOTALS, {}),
        ({"sums": [SUM | {"bits": "2"}]}, TOTALS, {}),
        ({"sums": [SUM | {"probe": "cauchy"}]}, TOTALS, {}),
        ({"sums": [SUM | {"seed": -1}]}, TOTALS, {}),
        ({"sums": [SUM | {"exponent": 0.5}]}, TOTALS, {}),
        ({"sums": [SUM | {"exponent": 10**6}]}, TOTALS, {}),
        ({"sums": [SUM | {"places": [[99], [0]]}]}, TOTALS, {}),
        ({"sums": [SUM | {"places": [[0], [1]]}]}, TOTALS, {}),
        ({"sums": [SUM]}, {"sums.0.totals": torch.tensor([0.5, 1.0])}, {}),
        (LOW_RANK, {}, {"schema": 2}),
        (LOW_RANK, {}, {"plan": None}),
        (LOW_RANK, {}, {"plan": []}),
        (LOW_RANK, {}, {"plan": {}}),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(make_plan, layout, view, tensors, changes):
    if view is LOW_RANK:
        view = {"adapter": LOW_RANK["adapter"] | {"layout": layout.fingerprint}}
    data = plan_bytes(make_plan(), view, tensors, **changes)
    with pytest.raises(UpdateRejected):
        decode_plan(data)[1].read(layout)


@settings(max_examples=250)
@given(choices=st.data())
def test_damaged_plans_are_plans_or_refused(make_plan, layout, low_rank, choices):
    views = [None, low_rank(1, 2), low_rank(2, 1, names=(Q,))]
    view = choices.draw(st.sampled_from(views))
    pool = ProbeSum.pool(layout, 5, 4, "rank1", -20)
    moved = pool.add(SeedScalars(layout, 5, 4, [1, 3], [1e-3, 2e-3], "rank1"))
    sums = choices.draw(st.sampled_from([(), (moved,)]))
    dtype = choices.draw(st.sampled_from([None, "int8"]))
    data = encode_plan(make_plan(), View(view, sums), dtype)

    def read(data):
        plan, sealed = decode_plan(data)
        return plan, sealed.read(layout)

    found, rejection = outcome(read, damaged(choices, data))
    if rejection is not None:
        assert rejection.detail.isprintable()
        return
    plan, seen = found
    assert isinstance(plan, Plan)
    assert all(b.shape[1] == a.shape[0] for b, a, _ in (seen.factors() or {}).values())
    assert all(one.dense() is not None for one in seen.sums)


@given(data=st.binary(max_size=100))
def test_random_bytes_are_no_message(data):
    for read in (decode_plan, open_reply):
        with pytest.raises(UpdateRejected):
            read(data)


# Replies


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_a_reply_holds_the_update_and_its_digest(make_plan, make_reply, low_rank, layout, dtype):
    plan, update = make_plan(wire_dtype=dtype), low_rank(1)
    reply = make_reply(update, plan)
    assert make_reply(update, plan) == reply
    envelope, body = open_reply(reply)
    assert (envelope.run, envelope.round, envelope.node, envelope.nonce) == (
        plan.run, plan.round, plan.node, plan.nonce,
    )  # fmt: skip
    assert (envelope.layout, envelope.base_digest) == (plan.layout, plan.base_digest)
    assert envelope.report.examples == 7
    assert envelope.report.evaluation.correct == 2
    assert envelope.payload_digest == hashlib.sha256(body).hexdigest()
    assert decode(body, layout) == decode(encode(update, dtype), layout)


def test_an_evaluation_has_no_body(make_plan, make_reply):
    envelope, body = open_reply(make_reply(None, make_plan(action="evaluate")))
    assert body == b""
    assert envelope.report.evaluation.tokens == 5


def test_a_shared_a_is_not_sent(make_plan, make_reply, low_rank):
    for dtype in (None, "int8"):
        plan = make_plan(train_a=False, wire_dtype=dtype)
        _, body = open_reply(make_reply(low_rank(1), plan))
        _, tensors = unpack(body)
        assert {key.rpartition("#")[2] for key in tensors} <= {"B", "B.s", "scale"}
        whole = make_reply(low_rank(1), make_plan(wire_dtype=dtype))
        assert len(body) < len(open_reply(whole)[1])


@pytest.mark.parametrize(
    ("path", "value", "verdict", "words"),
    [
        (("report", "examples"), 0, Verdict.WEIGHT, "examples"),
        (("report", "examples"), -3, Verdict.WEIGHT, "examples"),
        (("report", "examples"), "many", Verdict.WEIGHT, "examples"),
        (("report", "examples"), None, Verdict.WEIGHT, "examples"),
        (("report", "train_loss"), -1.0, Verdict.MALFORMED, "train_loss"),
        (("report", "train_loss"), 1e300, Verdict.MALFORMED, "train_loss"),
        (("report", "steps"), 1.5, Verdict.MALFORMED, "steps"),
        (("report", "surprise"), 1, Verdict.MALFORMED, "surprise"),
        (("report", "evaluation"), [], Verdict.MALFORMED, "evaluation"),
        (("report",), None, Verdict.MALFORMED, "report"),
        (("run",), 5, Verdict.MALFORMED, "run"),
        (("round",), "soon", Verdict.MALFORMED, "round"),
        (("schema_version",), 2, Verdict.MALFORMED, "schema_version"),
        (("surprise",), 1, Verdict.MALFORMED, "surprise"),
    ],
)
def test_an_envelope_out_of_bounds(make_reply, low_rank, forge, path, value, verdict, words):
    def change(envelope, _):
        for key in path[:-1]:
            envelope = envelope[key]
        envelope[path[-1]] = value

    with pytest.raises(UpdateRejected) as caught:
        open_reply(forge(make_reply(low_rank(1)), envelope=change))
    assert caught.value.verdict is verdict
    assert words in caught.value.detail


@pytest.mark.parametrize("field", ["train_loss", "train_loss_first", "evaluation.loss_sum"])
@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_that_are_not_finite(make_reply, low_rank, raw, field, number):
    header, _ = unpack(make_reply(low_rank(1)))
    report = header["envelope"]["report"]
    *outer, last = field.split(".")
    for key in outer:
        report = report[key]
    report[last] = "HERE"
    inner = json.dumps(header).replace('"HERE"', number)
    with pytest.raises(UpdateRejected) as caught:
        open_reply(raw({"__metadata__": {METADATA_KEY: inner}}))
    # NaN and Infinity are no JSON; a number too large for a float is.
    expected = Verdict.NOT_FINITE if "e" in number else Verdict.MALFORMED
    assert caught.value.verdict is expected


@pytest.mark.parametrize(
    "tensors",
    [
        {"body": torch.ones(3)},
        {"body": torch.ones(1, 3, dtype=torch.uint8)},
        {"body": torch.ones((), dtype=torch.uint8)},
        {"body": torch.ones(3, dtype=torch.int8)},
        {"body": torch.ones(3, dtype=torch.uint8), "more": torch.ones(1)},
        {"other": torch.ones(3, dtype=torch.uint8)},
    ],
)
def test_a_body_that_is_no_string_of_bytes(make_reply, low_rank, tensors):
    header, _ = unpack(make_reply(low_rank(1)))
    with pytest.raises(UpdateRejected) as caught:
        open_reply(pack(header, tensors))
    assert caught.value.verdict is Verdict.MALFORMED


@pytest.mark.parametrize("header", [{}, {"envelope": None}, {"envelope": []}, {"envelope": "x"}])
def test_a_reply_without_an_envelope(header):
    with pytest.raises(UpdateRejected) as caught:
        open_reply(pack(header, {}))
    assert caught.value.verdict is Verdict.MALFORMED


@pytest.mark.parametrize("depth", [*range(100, 1000, 150), *range(960, 1000, 2)])
def test_envelopes_nested_at_every_depth(raw, depth):
    nested = "[" * depth + "]" * depth
    for inner in (
        f'{{"envelope":{nested}}}',
        f'{{"envelope":{{"report":{nested}}}}}',
        f'{{"schema":1,"plan":{{"data":{{"a":{nested}}}}}}}',
        f'{{"schema":{nested}}}',
    ):
        for read in (open_reply, decode_plan):
            with pytest.raises(UpdateRejected):
                read(raw({"__metadata__": {METADATA_KEY: inner}}))


@settings(max_examples=250)
@given(choices=st.data())
def test_damaged_replies_are_replies_or_refused(make_reply, low_rank, choices):
    data = make_reply(choices.draw(st.sampled_from([None, low_rank(1, 2)])))
    found, rejection = outcome(open_reply, damaged(choices, data))
    if rejection is not None:
        assert rejection.detail.isprintable()
        return
    envelope, body = found
    assert isinstance(envelope.report, Report)
    assert isinstance(body, bytes)


# What a node can do


def capabilities(**changes):
    values = {
        "node": "phone", "examples": 3, "held_out": 0, "rank_limit": 8, "base_digest": "0" * 64,
        "layout_json": Layout({"a": (2, 3)}).to_json(), "threads": 1, "memory_bytes": 1,
        "device": "cpu", "versions": {"torch": "2"},
    }  # fmt: skip
    return Capabilities.model_validate(values | changes)


def test_capabilities_come_back_equal():
    assert Capabilities.from_bytes(capabilities().to_bytes()) == capabilities()


@pytest.mark.parametrize(
    "text", ["", "{}", "[[]]", '[["a",[1e999]]]', '{"a1":0}', '[["a",[0]]]', "[" * 10_000, "null"]
)
def test_a_layout_that_is_none_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"layout|shape"):
        Capabilities.from_bytes(capabilities(layout_json=text or "x").to_bytes())


@settings(max_examples=200)
@given(choices=st.data())
def test_damaged_capabilities_are_capabilities_or_value_errors(choices):
    value = replaced(choices.draw, json.loads(capabilities().to_bytes()))
    try:
        found = Capabilities.from_bytes(json.dumps(value).encode())
    except ValueError:
        return
    Layout.from_json(found.layout_json)


# The A that a seed stands for


@settings(max_examples=50)
@given(
    seed=SEEDS, tensor_id=st.integers(0, 500), rank=st.integers(1, 12), columns=st.integers(1, 40)
)
def test_a_smaller_rank_gives_the_first_rows(seed, tensor_id, rank, columns):
    whole = shared_a(seed, tensor_id, 12, columns)
    part = shared_a(seed, tensor_id, rank, columns)
    assert (part.dtype, tuple(part.shape)) == (torch.float32, (rank, columns))
    assert torch.equal(part, whole[:rank])
    magnitude = torch.full_like(part, 1 / math.sqrt(3 * columns))
    torch.testing.assert_close(part.abs(), magnitude)


def test_other_seeds_and_tensors_have_another_a():
    found = {shared_a(s, t, 4, 32).numpy().tobytes() for s in (1, 2, 2**62) for t in (0, 1, 7)}
    assert len(found) == 9
    a = shared_a(5, 0, 64, 64)
    assert float(a.mean().abs()) < 3 / math.sqrt(3 * 64) / 64
    gram = a @ a.T * 3
    assert float((gram - torch.eye(64)).abs().max()) < 6 / math.sqrt(64)


def test_evaluations_are_sums(make_plan):
    with pytest.raises(ValueError, match="loss_sum"):
        Evaluation(loss_sum=math.nan, tokens=1, correct=1, examples=1)
    with pytest.raises(ValueError, match="tokens"):
        Evaluation(loss_sum=1.0, tokens=-1, correct=1, examples=1)


@pytest.mark.parametrize(
    "impossible",
    [
        {"correct": 6},
        {"examples": 6},
        {"new_tokens": 6},
        {"tokens": 0, "correct": 0, "examples": 0},
        {"loss_sum": 1e15},
        {"new_loss_sum": 1.0},
    ],
)
def test_a_node_cannot_claim_more_than_there_is(impossible):
    honest = {"loss_sum": 3.0, "tokens": 5, "correct": 2, "examples": 1}
    Evaluation(**honest)
    with pytest.raises(ValueError):  # noqa: PT011
        Evaluation(**(honest | impossible))
