"""Bytes are lossless or within a stated bound, and hostile bytes are refused, never a crash."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aggregators import Dense, LowRank, UpdateRejected, Verdict, decode, encode
from aggregators.codec import METADATA_KEY, WIRE_DTYPES, pack, unpack

Q, UP, DOWN = (f"model.layers.0.{part}.weight" for part in ("q_proj", "up_proj", "down_proj"))
NORM = "model.norm.weight"
SEEDS = st.integers(0, 2**32)
MAGNITUDES = st.sampled_from([1e-6, 1e-2, 1.0, 1e3])
# The largest relative rounding error of a normal number, and half the smallest positive number.
ROUNDING = {
    "float32": (2.0**-24, 2.0**-150),
    "bfloat16": (2.0**-8, 2.0**-134),
    "float16": (2.0**-11, 2.0**-25),
}
TYPES = [
    "BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64",
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "X",
]  # fmt: skip
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I64": 8, "U64": 8,
         "F64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip


def dense_update(layout, seed, magnitude=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {spec.name: spec.shape for spec in layout}
    return Dense(
        layout, {n: magnitude * torch.randn(s, generator=generator) for n, s in shapes.items()}
    )


def refused(data, layout, **limits):
    with pytest.raises(UpdateRejected) as caught:
        decode(data, layout, **limits)
    return caught.value


# Lossless or bounded


@given(seed=SEEDS, rank=st.integers(1, 9), magnitude=MAGNITUDES)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_float_type_rounds_each_factor_once(low_rank, layout, dtype, seed, rank, magnitude):
    update = low_rank(seed, rank, dtype=torch.float64)
    update = LowRank(layout, {n: (magnitude * f.B, f.A, 0.5) for n, f in update.factors.items()})
    relative, absolute = ROUNDING[dtype]
    again = decode(encode(update, dtype), layout)
    for name, factors in update.factors.items():
        for sent, found in (
            (factors.B, again.factors[name].B),
            (factors.A, again.factors[name].A),
        ):
            assert found.dtype == WIRE_DTYPES[dtype]
            error = (found.double() - sent).abs()
            assert bool((error <= relative * sent.abs() * (1 + 1e-3) + absolute).all())
        assert torch.equal(again.factors[name].scale, factors.scale)


@given(seed=SEEDS, rank=st.integers(1, 9), magnitude=MAGNITUDES)
def test_int8_is_within_half_a_step_of_each_component(low_rank, layout, seed, rank, magnitude):
    update = low_rank(seed, rank)
    spread = torch.logspace(-3, 3, rank)  # components of unlike size must not share a step
    update = LowRank(
        layout, {n: (magnitude * f.B * spread, f.A, f.scale) for n, f in update.factors.items()}
    )
    again = decode(encode(update, "int8"), layout)
    for name, factors in update.factors.items():
        found = again.factors[name]
        for sent, got, dim in ((factors.B, found.B, 0), (factors.A, found.A, 1)):
            step = sent.abs().amax(dim=dim, keepdim=True) / 127
            assert bool(((got - sent).abs() <= step * (0.5 + 1e-4)).all())


@given(seed=SEEDS, magnitude=MAGNITUDES)
def test_int8_is_within_half_a_step_of_each_row(layout, seed, magnitude):
    update = dense_update(layout, seed, magnitude)
    again = decode(encode(update, "int8"), layout)
    for name, sent in update.tensors.items():
        largest = sent.abs().amax(dim=-1, keepdim=True) if sent.ndim else sent.abs()
        error = (again.tensors[name] - sent).abs()
        assert bool((error <= largest / 127 * (0.5 + 1e-4)).all())


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_zero_stays_zero(layout, dtype):
    update = LowRank(layout, {Q: (torch.zeros(6, 2), torch.zeros(2, 6), 1.0)})
    assert decode(encode(update, dtype), layout).squared_norm() == 0.0


def test_short_types_are_shorter(low_rank):
    update = low_rank(1, 64)
    sizes = [len(encode(update, dtype)) for dtype in (None, "bfloat16", "int8")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(encode(update, "float16")) < 0.55 * len(encode(update))


def test_bytes_do_not_depend_on_the_order_of_names(low_rank, layout):
    update = low_rank(1, 3)
    turned = LowRank(layout, {n: (f.B, f.A, f.scale) for n, f in reversed(update.factors.items())})
    assert encode(turned) == encode(update)
    assert turned == update


def test_views_and_shared_tensors_are_sent_like_copies(layout):
    square, weights = torch.randn(6, 6), torch.tensor([1.0, 2.0], dtype=torch.float64)
    b, a = square[:, :2], square.T[:2]  # parts of one storage, with strides
    update = LowRank(layout, {Q: (b, a, weights), DOWN: (b, torch.ones(2, 9), weights)})
    copies = LowRank(
        layout,
        {Q: (b.clone(), a.clone(), weights.clone()), DOWN: (b, torch.ones(2, 9), weights.clone())},
    )
    assert encode(update) == encode(copies)
    assert decode(encode(update), layout) == update


def test_training_state_does_not_travel(layout):
    b, a = (torch.nn.Parameter(torch.ones(shape)) for shape in ((6, 2), (2, 6)))
    again = decode(encode(LowRank(layout, {Q: (b, a, 1.0)})), layout)
    assert not again.factors[Q].B.requires_grad


def test_unknown_types_and_families_are_the_callers_errors(low_rank):
    with pytest.raises(ValueError, match="float8"):
        encode(low_rank(), "float8")

    class Stranger:
        family = "stranger"
        layout = low_rank().layout

    with pytest.raises(TypeError, match="stranger"):
        encode(Stranger())


# Refusals, each with its verdict

ONE = torch.ones(1, dtype=torch.float64)


def parts(**changes):
    """The tensors of a good update of q_proj, with changes; None takes a part away."""
    tensors = {"B": torch.ones(6, 2), "A": torch.ones(2, 6), "scale": ONE} | changes
    return {
        f"{Q}#{part.replace('_', '.')}": value
        for part, value in tensors.items()
        if value is not None
    }


def int8(*shape):
    return torch.ones(shape, dtype=torch.int8)


LOW_RANK_REFUSALS = {
    "B missing": (parts(B=None), Verdict.MALFORMED),
    "A missing": (parts(A=None), Verdict.MALFORMED),
    "scale missing": (parts(scale=None), Verdict.MALFORMED),
    "unknown part": (parts(C=ONE), Verdict.MALFORMED),
    "scales beside floats": (parts(B_s=torch.ones(1, 2)), Verdict.MALFORMED),
    "no part at all": ({Q: ONE}, Verdict.UNKNOWN_TENSOR),
    "unknown tensor": ({"other#B": ONE}, Verdict.UNKNOWN_TENSOR),
    "rows": (parts(B=torch.ones(5, 2)), Verdict.SHAPE),
    "columns": (parts(A=torch.ones(2, 7)), Verdict.SHAPE),
    "ranks differ": (parts(A=torch.ones(3, 6)), Verdict.SHAPE),
    "rank 0": (parts(B=torch.ones(6, 0), A=torch.ones(0, 6)), Verdict.SHAPE),
    "B is a vector": (parts(B=torch.ones(6)), Verdict.SHAPE),
    "A is a number": (parts(A=torch.ones(())), Verdict.SHAPE),
    "scale's length": (parts(scale=torch.ones(3, dtype=torch.float64)), Verdict.SHAPE),
    "scale is empty": (parts(scale=torch.ones(0, dtype=torch.float64)), Verdict.SHAPE),
    "scale is a matrix": (parts(scale=torch.ones(1, 1, dtype=torch.float64)), Verdict.DTYPE),
    "scale's type": (parts(scale=torch.ones(1)), Verdict.DTYPE),
    "integers": (parts(B=torch.ones(6, 2).int()), Verdict.DTYPE),
    "truth values": (parts(B=torch.ones(6, 2).bool()), Verdict.DTYPE),
    "complex": (parts(B=torch.ones(6, 2, dtype=torch.complex64)), Verdict.DTYPE),
    "float8": (parts(B=torch.ones(6, 2).to(torch.float8_e4m3fn)), Verdict.DTYPE),
    "int8 without scales": (parts(B=int8(6, 2)), Verdict.DTYPE),
    "int8 scales' type": (parts(B=int8(6, 2), B_s=torch.ones(1, 2).double()), Verdict.DTYPE),
    "int8 scales' shape": (parts(B=int8(6, 2), B_s=torch.ones(2)), Verdict.SHAPE),
    "int8 vector": (parts(A=int8(6), A_s=torch.ones(1)), Verdict.SHAPE),
    "int8 number": (parts(A=int8(), A_s=torch.ones(())), Verdict.SHAPE),
    "NaN": (parts(B=torch.full((6, 2), math.nan)), Verdict.NOT_FINITE),
    "infinite": (parts(A=torch.full((2, 6), -math.inf)), Verdict.NOT_FINITE),
    "float16 NaN": (parts(B=torch.full((6, 2), math.nan).half()), Verdict.NOT_FINITE),
    "bfloat16 NaN": (parts(B=torch.full((6, 2), math.nan).bfloat16()), Verdict.NOT_FINITE),
    "scale NaN": (parts(scale=math.nan * ONE), Verdict.NOT_FINITE),
    "int8 scales NaN": (
        parts(B=int8(6, 2), B_s=torch.tensor([[1.0, math.nan]])), Verdict.NOT_FINITE),
    "int8 overflow": (
        parts(B=100 * int8(6, 2), B_s=torch.full((1, 2), 3e38)), Verdict.NOT_FINITE),
    "a vector's tensor": (
        {f"{NORM}#{p}": v for p, v in (("B", ONE[:, None]), ("A", ONE[:, None]), ("scale", ONE))},
        Verdict.SHAPE),
}  # fmt: skip

DENSE_REFUSALS = {
    "shape": ({f"{NORM}#D": torch.ones(7)}, Verdict.SHAPE),
    "broadcast": ({f"{NORM}#D": torch.ones(1)}, Verdict.SHAPE),
    "type": ({f"{NORM}#D": torch.ones(6).long()}, Verdict.DTYPE),
    "NaN": ({f"{NORM}#D": torch.full((6,), math.nan)}, Verdict.NOT_FINITE),
    "factors": ({f"{NORM}#B": torch.ones(6, 1)}, Verdict.MALFORMED),
    "scales alone": ({f"{NORM}#D.s": torch.ones(1)}, Verdict.MALFORMED),
    "int8 without scales": ({f"{NORM}#D": int8(6)}, Verdict.DTYPE),
    "int8 scales' shape": ({f"{NORM}#D": int8(6), f"{NORM}#D.s": torch.ones(6)}, Verdict.SHAPE),
}


@pytest.mark.parametrize(
    ("family", "tensors", "verdict"),
    [
        *(pytest.param("low_rank", *case, id=name) for name, case in LOW_RANK_REFUSALS.items()),
        *(pytest.param("dense", *case, id=f"dense {n}") for n, case in DENSE_REFUSALS.items()),
    ],
)
def test_tensors_that_make_no_update(layout, family, tensors, verdict):
    data = pack({"schema": 1, "family": family, "layout": layout.fingerprint}, tensors)
    rejection = refused(data, layout)
    assert rejection.verdict is verdict
    assert next(iter(tensors)).rpartition("#")[0] in rejection.detail


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"schema": 2}, Verdict.MALFORMED, "schema 2"),
        ({"schema": None}, Verdict.MALFORMED, "schema None"),
        ({"layout": "0" * 64}, Verdict.WRONG_LAYOUT, "000000000000"),
        ({"layout": ["a", 1]}, Verdict.WRONG_LAYOUT, "layout"),
        ({"family": "seed_scalars"}, Verdict.MALFORMED, "master seed"),
        ({"family": "gradients"}, Verdict.WRONG_FAMILY, "gradients"),
        ({"family": ["low_rank"]}, Verdict.WRONG_FAMILY, "family"),
        ({"family": {"a": 1}}, Verdict.WRONG_FAMILY, "family"),
    ],
)
def test_headers_of_something_else(layout, changes, verdict, words):
    header = {"schema": 1, "family": "low_rank", "layout": layout.fingerprint} | changes
    rejection = refused(pack(header, parts()), layout)
    assert rejection.verdict is verdict
    assert words in rejection.detail


def test_a_limit_of_bytes_is_checked_before_they_are_read(low_rank, layout):
    data = encode(low_rank())
    assert decode(data, layout, max_bytes=len(data)) == low_rank()
    rejection = refused(data, layout, max_bytes=len(data) - 1)
    assert rejection.verdict is Verdict.TOO_LARGE
    assert str(len(data)) in rejection.detail


def test_tensors_have_memory_of_their_own(low_rank):
    _, tensors = unpack(encode(low_rank()))
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors)


@pytest.mark.parametrize("text", ["\ud800", "\x1b[2J", "\0", "\n", "x" * 100_000])
def test_what_a_node_wrote_is_quoted_safely(layout, raw, text):
    inner = json.dumps({"schema": 1, "layout": text, "family": text})
    for header in (
        {"__metadata__": {METADATA_KEY: inner}},
        {"__metadata__": {METADATA_KEY: json.dumps({"schema": text})}},
    ):
        detail = refused(raw(header), layout).detail
        assert detail.encode().decode() == detail
        assert detail.isprintable()
        assert len(detail) <= 2000


# Any bytes at all

NESTED = b"[" * 100_000 + b"]" * 100_000
TWICE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
GOOD = b'"__metadata__":{"fedbraid":"{}"}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 8,
        b"\xff" * 64,
        (2**63).to_bytes(8, "little") + b"{}",
        (17 << 20).to_bytes(8, "little") + bytes(18 << 20),
        (3).to_bytes(8, "little") + b"{}",
    ],
    ids=["empty", "short", "no header", "claim", "claims", "giant", "over the limit", "one less"],
)
def test_impossible_header_lengths(layout, data):
    assert refused(data, layout).verdict is Verdict.MALFORMED


@pytest.mark.parametrize(
    "header",
    [
        b"null", b"[]", b"7", b'"text"', b"{", b"\xff\xfe{", b"NaN", NESTED, b"9" * 5000,
        b"{}", b'{"__metadata__":null}', b'{"__metadata__":[]}', b'{"__metadata__":"fedbraid"}',
        b'{"__metadata__":{"fedbraid":7}}', b'{"__metadata__":{"fedbraid":null}}',
        b'{"__metadata__":{"fedbraid":"7"}}', b'{"__metadata__":{"fedbraid":"null"}}',
        b'{"__metadata__":{"fedbraid":"[]"}}', b'{"__metadata__":{"fedbraid":"{"}}',
        b'{"__metadata__":{"fedbraid":"{\\"a\\":NaN}"}}',
        b'{"__metadata__":{"fedbraid":"{\\"a\\":Infinity}"}}',
        b'{"__metadata__":{"fedbraid":"' + NESTED + b'"}}',
        b"{" + GOOD + b"," + GOOD + b"}",
        b"{" + GOOD + b',"a":7}',
        b"{" + GOOD + b',"a":{}}',
        b"{" + GOOD + b',"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b"{" + GOOD + b',"a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,4]}}',
        b"{" + GOOD + b',"a":{"dtype":"F32","shape":[18446744073709551615,0],"data_offsets":[0,0]}}',
        b"{" + GOOD + b',"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        b"{" + GOOD + b',"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}',
        b"{" + GOOD + b',"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}',
        b"{" + GOOD + b',7:' + TWICE + b"}",
    ],
)  # fmt: skip
def test_headers_that_are_no_safetensors(layout, raw, header):
    assert refused(raw(header, bytes(4)), layout).verdict is Verdict.MALFORMED


@pytest.mark.parametrize("depth", [*range(100, 1000, 150), *range(960, 1000, 2)])
def test_nesting_at_every_depth(layout, raw, depth):
    nested = "[" * depth + "]" * depth
    for field in ("schema", "layout", "family", "other"):
        values = {"schema": "1", "layout": f'"{layout.fingerprint}"', "family": '"x"'}
        inner = ",".join(f'"{k}":{v}' for k, v in (values | {field: nested}).items())
        refused(raw({"__metadata__": {METADATA_KEY: "{" + inner + "}"}}), layout)


def test_a_tensor_that_stands_twice(low_rank, layout, raw):
    refused(raw(b"{" + GOOD + b',"a":' + TWICE + b',"a":' + TWICE + b"}", bytes(4)), layout)


@given(data=st.binary(max_size=200))
@example(data=b"\x02" + b"\0" * 7 + b"{}")
def test_random_bytes(layout, data):
    refused(data, layout)


@settings(max_examples=400)
@given(choices=st.data())
def test_damaged_updates_are_updates_or_refused(low_rank, layout, choices):
    valid = [
        encode(low_rank(1, 2)),
        encode(low_rank(2, 2, [1.0, 2.0]), "int8"),
        encode(low_rank(3, 1, names=(Q,)), "float16"),
        encode(dense_update(layout, 4), "bfloat16"),
        encode(dense_update(layout, 5), "int8"),
    ]
    data = bytearray(choices.draw(st.sampled_from(valid)))
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(choices.draw(st.integers(1, 4))):
        # Half of the damage goes where the structure is.
        limit = choices.draw(st.sampled_from([header, len(data)]))
        at = choices.draw(st.integers(0, max(0, min(limit, len(data)) - 1)))
        kind = choices.draw(st.sampled_from(["flip", "set", "cut", "insert", "remove", "repeat"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << choices.draw(st.integers(0, 7))
        elif kind == "set" and at < len(data):
            data[at] = choices.draw(st.sampled_from(list(b'\0\xff09-"{}[]:,e#BAsD')))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = choices.draw(st.binary(min_size=1, max_size=8))
        elif kind == "remove":
            del data[at : at + choices.draw(st.integers(1, 16))]
        else:
            data[at:at] = data[at : at + choices.draw(st.integers(1, 64))]
    update_or_refused(bytes(data), layout)


@st.composite
def structured(draw):
    """A well-formed buffer of ill-chosen tensors: names, parts, types and shapes at random."""
    names = st.sampled_from([Q, Q, UP, NORM, "temperature", "", "#", "other"])
    keys = st.builds(
        lambda name, part: f"{name}#{part}",
        names,
        st.sampled_from(["B", "A", "scale", "B.s", "A.s", "D", "D.s", "", "B#A"]),
    )
    header, content = {}, b""
    for key in draw(st.lists(keys, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(TYPES))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 6, 9]), max_size=3))
        size = SIZES.get(dtype, 4) * math.prod(shape)
        fill = draw(st.sampled_from([b"\0", b"\1", b"\x7f", b"\xff", b"\x3c"]))
        offsets = [len(content), len(content) + size]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        content += fill * size
    return header, content, draw(st.sampled_from(["low_rank", "dense"]))


@settings(max_examples=400)
@given(buffer=structured())
def test_ill_chosen_tensors_are_updates_or_refused(layout, raw, buffer):
    header, content, family = buffer
    inner = json.dumps({"schema": 1, "family": family, "layout": layout.fingerprint})
    data = raw({"__metadata__": {METADATA_KEY: inner}} | header, content)
    update_or_refused(data, layout)


def outcome(read, *arguments):
    """What ``read`` returns and None, or None and its refusal; anything else fails the test."""
    try:
        return read(*arguments), None
    except UpdateRejected as rejection:
        return None, rejection


def update_or_refused(data, layout):
    update, rejection = outcome(decode, data, layout)
    if rejection is not None:
        assert rejection.verdict in Verdict
        assert rejection.detail
        return
    for name, change in update.dense().items():
        assert tuple(change.shape) == layout.shape(name)
    encode(update)
