"""The catalogue of bad input: everything that a reply can be wrong in, and the verdicts that answer it.

    python -m simulations.benchmarks.bad_input

Each case makes a family's honest reply bad. ``expected`` is every verdict that says what is wrong with
it: families look at the same damage from different sides.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import typer
from rich.table import Table

from aggregators import UpdateRejected, Verdict, admit, decode
from aggregators.codec import METADATA_KEY, pack, unpack
from aggregators.gate import most_bytes
from aggregators.messages import open_body
from simulations.benchmarks.specimens import LAYOUT, Specimen, forge, specimens, with_body
from simulations.benchmarks.tables import table_console

V = Verdict
Damage = Callable[[bytes, Specimen], bytes]
INSIDE = "inside"


@dataclass(frozen=True)
class Case:
    """``layer``: "inside" is within the update's own bytes, "reply" around them."""

    damage: Damage
    expected: frozenset[Verdict]
    layer: str = "reply"


def case(damage: Damage, *expected: Verdict, layer: str = "reply") -> Case:
    return Case(damage, frozenset(expected), layer)


# Values and shapes: of the family's largest tensor


def main(change: Callable[[torch.Tensor], torch.Tensor], *expected: Verdict) -> Case:
    def damage(reply: bytes, specimen: Specimen) -> bytes:
        def apply(header: dict[str, Any], tensors: dict[str, Any]) -> None:
            tensors[specimen.main] = change(tensors[specimen.main]).contiguous()

        return forge(reply, body=apply)

    return case(damage, *expected, layer=INSIDE)


def filled(value: float, dtype: torch.dtype | None = None) -> Callable[[torch.Tensor], Any]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.clone() if dtype is None else tensor.to(dtype)
        found.view(-1)[-1] = value
        return found

    return change


def cast(dtype: torch.dtype) -> Callable[[torch.Tensor], Any]:
    return lambda tensor: tensor.to(dtype)


FITS = (V.SHAPE, V.MALFORMED, V.RANK)
VALUES = {
    "NaN": main(filled(math.nan), V.NOT_FINITE),
    "infinite": main(filled(math.inf), V.NOT_FINITE),
    "negatively infinite": main(filled(-math.inf), V.NOT_FINITE),
    "NaN in float16": main(filled(math.nan, torch.float16), V.NOT_FINITE, V.DTYPE),
    "NaN in bfloat16": main(filled(math.nan, torch.bfloat16), V.NOT_FINITE),
    "NaN in float64": main(filled(math.nan, torch.float64), V.NOT_FINITE),
    "all NaN": main(lambda t: torch.full_like(t, math.nan), V.NOT_FINITE),
    "near float64's end": main(filled(1e308, torch.float64), V.NORM, V.OVERFLOW, V.NOT_FINITE),
    "its square overflows": main(filled(1e200, torch.float64), V.NORM, V.OVERFLOW, V.NOT_FINITE),
    "a norm above the limit": main(filled(1e8, torch.float64), V.NORM),
    "a norm far above it": main(filled(1e30, torch.float64), V.NORM, V.OVERFLOW),
}
TYPES = {
    f"of type {str(dtype).removeprefix('torch.')}": main(cast(dtype), V.DTYPE)
    for dtype in (
        torch.int32, torch.int64, torch.int16, torch.uint8, torch.bool, torch.complex64,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
    )
}  # fmt: skip
SHAPES = {
    "one row less": main(lambda t: t[:-1], *FITS),
    "one row more": main(lambda t: torch.cat([t, t[:1]]), *FITS),
    "no rows": main(lambda t: t[:0], *FITS),
    "one number": main(lambda t: t.flatten()[0], *FITS),
    "one number of a vector": main(lambda t: t.flatten()[:1], *FITS),
    "one dimension more": main(lambda t: t[None], *FITS),
    "one dimension more at its end": main(lambda t: t[..., None], *FITS),
    "three dimensions more": main(lambda t: t[None, None, None], *FITS),
    "ten times as long": main(lambda t: t.repeat(10, *[1] * (t.ndim - 1)), *FITS),
    "ten thousand times as long": main(lambda t: t.repeat(10_000, *[1] * (t.ndim - 1)),
                                       *FITS, V.TOO_LARGE),
    "sixty dimensions": main(lambda t: t.reshape([1] * 60 + list(t.shape)), *FITS),
}  # fmt: skip


# What the update says of itself


def header(**fields: Any) -> Damage:
    def damage(reply: bytes, specimen: Specimen) -> bytes:
        return forge(reply, body=lambda header, tensors: header.update(fields))

    return damage


def without_header(field: str) -> Damage:
    return lambda reply, _: forge(reply, body=lambda header, tensors: header.pop(field))


def tensors(change: Callable[[dict[str, Any], str], Any]) -> Damage:
    def damage(reply: bytes, specimen: Specimen) -> bytes:
        return forge(reply, body=lambda header, found: change(found, specimen.main))

    return damage


def stranger(name: str) -> Damage:
    return tensors(lambda found, main: found.update({name: torch.ones(2)}))


ODD = (V.UNKNOWN_TENSOR, V.MALFORMED)
UPDATES = {
    "no tensor": case(tensors(lambda t, main: t.clear()), V.MALFORMED, V.EMPTY, layer=INSIDE),
    "no main tensor": case(tensors(lambda t, main: t.pop(main)), V.MALFORMED, layer=INSIDE),
    **{f"a tensor named {name[:20]!r}": case(stranger(name), *ODD, layer=INSIDE)
       for name in ("surprise", "", "#", "#B", "../../etc/passwd", "x\0y", "\u202e", "n" * 10_000,
                    "norm.weight#X", "__class__")},
    "the main tensor twice": case(
        tensors(lambda t, main: t.update({f"{main}.s": t[main].float()})), *ODD, V.SHAPE,
        layer=INSIDE),
    "five thousand tensors": case(
        tensors(lambda t, main: t.update({str(n): torch.ones(1) for n in range(5000)})), *ODD,
        V.TOO_LARGE, layer=INSIDE),
    "every number zero": case(
        tensors(lambda t, main: [
            x.zero_() for key, x in t.items() if x.is_floating_point() or key.endswith("digits")]),
        V.EMPTY, layer=INSIDE),
    "a change that the report denies": case(
        lambda reply, specimen: report(unchanged=True)(reply, specimen), V.MALFORMED, layer=INSIDE),
    "another layout": case(header(layout="0" * 64), V.WRONG_LAYOUT, layer=INSIDE),
    "no layout": case(without_header("layout"), V.WRONG_LAYOUT, layer=INSIDE),
    "a list as layout": case(header(layout=["a"]), V.WRONG_LAYOUT, layer=INSIDE),
    "schema 9": case(header(schema=9), V.MALFORMED, layer=INSIDE),
    "no schema": case(without_header("schema"), V.MALFORMED, layer=INSIDE),
    "schema as text": case(header(schema="1"), V.MALFORMED, layer=INSIDE),
    "a schema of lists": case(header(schema=[[[]]]), V.MALFORMED, layer=INSIDE),
    **{
        f"family {str(family)[:12]}": case(header(family=family), V.WRONG_FAMILY)
        for family in ("gradients", "", None, 7, True, ["low_rank"], {"low_rank": 1}, "x" * 9999)
    },
}  # fmt: skip


# Containers


def raw(header: Any, content: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def replaced(data: bytes) -> Damage:
    return lambda reply, _: data


def inside(data: bytes) -> Damage:
    return lambda reply, _: with_body(reply, data)


def cut(share: float) -> Damage:
    return lambda reply, _: reply[: int(len(reply) * share)]


def claim(change: int) -> Damage:
    def damage(reply: bytes, _: Specimen) -> bytes:
        size = int.from_bytes(reply[:8], "little") + change
        return size.to_bytes(8, "little") + reply[8:]

    return damage


def with_tensor(**fields: Any) -> dict[str, Any]:
    return {
        "__metadata__": META,
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields,
    }


META = {METADATA_KEY: "{}"}
WRONG: dict[str, dict[str, Any]] = {
    "a negative shape": {"shape": [-1]},
    "a shape that overflows": {"shape": [2**62, 2**62]},
    "a shape of 2**40": {"shape": [2**40]},
    "offsets beyond the end": {"data_offsets": [0, 400]},
    "offsets backwards": {"data_offsets": [4, 0]},
    "offsets of text": {"data_offsets": ["0", "4"]},
    "an unknown type": {"dtype": "X9"},
    "no type": {"dtype": None},
    "a shape of text": {"shape": "1"},
}
FOREIGN = {
    "nothing": b"",
    "one byte": b"\0",
    "seven bytes": b"\0" * 7,
    "eight zeros": b"\0" * 8,
    "all ones": b"\xff" * 64,
    "a pickle": pickle.dumps({"a": [1.0]}),
    "gzip": b"\x1f\x8b\x08\0" + bytes(60),
    "a zip file": b"PK\x03\x04" + bytes(60),
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(60),
    "JSON": b'{"update": 1}' * 9,
    "a header of null": raw(b"null"),
    "a header of a list": raw(b"[]"),
    "an empty header": raw({}),
    "a header that is not UTF-8": raw(b"\xff\xfe{}"),
    "a header without end": raw(b'{"__metadata__": {'),
    "a nested header": raw(b"[" * 100_000 + b"]" * 100_000),
    "a number of 5,000 digits": raw(b"9" * 5000),
    "metadata of another program": raw({"__metadata__": {"other": "{}"}}),
    "metadata of numbers": raw({"__metadata__": {METADATA_KEY: 7}}),
    "metadata of a list": raw({"__metadata__": {METADATA_KEY: "[]"}}),
    "metadata with NaN": raw({"__metadata__": {METADATA_KEY: '{"schema":NaN}'}}),
    "nested metadata": raw({"__metadata__": {METADATA_KEY: "[" * 60_000}}),
    **{f"a tensor with {what}": raw(with_tensor(**fields), bytes(4)) for what, fields in WRONG.items()},
}  # fmt: skip
CONTAINERS = {
    **{f"{name} as a reply": case(replaced(data), V.MALFORMED) for name, data in FOREIGN.items()},
    **{f"{name} as an update": case(inside(data), V.MALFORMED, V.WRONG_FAMILY, layer=INSIDE)
       for name, data in FOREIGN.items()},
    "cut to nine tenths": case(cut(0.9), V.MALFORMED),
    "cut in half": case(cut(0.5), V.MALFORMED),
    "without its last byte": case(lambda reply, _: reply[:-1], V.MALFORMED),
    "with a byte behind it": case(lambda reply, _: reply + b"\0", V.MALFORMED),
    "twice in a row": case(lambda reply, _: reply + reply, V.MALFORMED),
    "a header one longer": case(claim(1), V.MALFORMED),
    "a header one shorter": case(claim(-1), V.MALFORMED),
    "a header of 2**40": case(claim(2**40), V.MALFORMED),
}  # fmt: skip


# Protocol: the envelope


def envelope(**fields: Any) -> Damage:
    return lambda reply, _: forge(reply, envelope=lambda found, tensors: found.update(fields))


def missing(field: str) -> Damage:
    return lambda reply, _: forge(reply, envelope=lambda found, tensors: found.pop(field))


def report(**fields: Any) -> Damage:
    return lambda reply, _: forge(
        reply, envelope=lambda found, tensors: found["report"].update(fields)
    )


def evaluation(**fields: Any) -> Damage:
    return lambda reply, _: forge(
        reply, envelope=lambda found, tensors: found["report"]["evaluation"].update(fields)
    )


def around(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Damage:
    """A change of what is around the envelope."""

    def damage(reply: bytes, _: Specimen) -> bytes:
        found, tensors = unpack(reply)
        change(found, tensors)
        return pack(found, tensors)

    return damage


ENVELOPES: tuple[Any, ...] = ([], "", 0, False, {})


def whole_envelope(value: Any) -> Damage:
    return around(lambda found, tensors: found.update(envelope=value))


PROTOCOL = {
    "another run": case(envelope(run="b-run"), V.WRONG_RUN),
    "no run": case(envelope(run=""), V.WRONG_RUN),
    "a run of 10,000 characters": case(envelope(run="r" * 10_000), V.WRONG_RUN),
    "an earlier round": case(envelope(round=2), V.STALE),
    "an earlier round's again": case(envelope(round=2, nonce="c" * 16), V.REPLAYED),
    "a later round": case(envelope(round=4), V.WRONG_ROUND),
    "round 0": case(envelope(round=0), V.STALE),
    "a negative round": case(envelope(round=-(2**70)), V.STALE),
    "a round of 100 digits": case(envelope(round=10**99), V.WRONG_ROUND),
    "another node": case(envelope(node="laptop"), V.WRONG_NODE),
    "no node": case(envelope(node=""), V.WRONG_NODE),
    "a node that moves the cursor": case(envelope(node="\x1b[2J\u202e"), V.WRONG_NODE),
    "half a character as node": case(envelope(node="\ud800"), V.WRONG_NODE, V.MALFORMED),
    "another nonce": case(envelope(nonce="f" * 16), V.WRONG_ROUND),
    "a counted nonce": case(envelope(nonce="c" * 16), V.DUPLICATE),
    "another layout": case(envelope(layout="0" * 64), V.WRONG_LAYOUT),
    "another base": case(envelope(base_digest="0" * 64), V.WRONG_BASE),
    "another digest": case(envelope(payload_digest="0" * 64), V.MALFORMED),
    "no digest": case(envelope(payload_digest=""), V.MALFORMED),
    **{f"{field} is missing": case(missing(field), V.MALFORMED)
       for field in ("run", "round", "node", "nonce", "layout", "base_digest", "payload_digest",
                     "report")},
    **{f"{field} is null": case(envelope(**{field: None}), V.MALFORMED)
       for field in ("run", "round", "node", "nonce", "report", "payload_digest")},
    "round as text": case(envelope(round="3"), V.MALFORMED),
    "round as a fraction": case(envelope(round=3.5), V.MALFORMED),
    "round as truth": case(envelope(round=True), V.MALFORMED),
    "node as a list": case(envelope(node=["phone"]), V.MALFORMED),
    "a field too many": case(envelope(admin=True), V.MALFORMED),
    "schema 2": case(envelope(schema_version=2), V.MALFORMED),
    "no examples": case(report(examples=0), V.WEIGHT),
    "negative examples": case(report(examples=-1), V.WEIGHT),
    "too many examples": case(report(examples=1001), V.WEIGHT),
    "examples of 30 digits": case(report(examples=10**30), V.WEIGHT),
    "examples as text": case(report(examples="7"), V.WEIGHT),
    "examples as truth": case(report(examples=True), V.WEIGHT),
    "a fraction of an example": case(report(examples=0.5), V.WEIGHT),
    "examples null": case(report(examples=None), V.WEIGHT),
    "an absurd loss": case(report(train_loss=1e300), V.MALFORMED),
    "a negative loss": case(report(train_loss=-1.0), V.MALFORMED),
    "a loss as text": case(report(train_loss="low"), V.MALFORMED),
    "negative steps": case(report(steps=-1), V.MALFORMED),
    "tokens of 14 digits": case(report(train_tokens=10**14), V.WEIGHT),
    "a report with more in it": case(report(weight=1000), V.MALFORMED),
    "another view": case(report(view="6" * 64), V.DIVERGED),
    "no view": case(report(view=""), V.DIVERGED),
    "a view that is no digest": case(report(view="yes"), V.MALFORMED),
    "a residual of another history": case(report(residual="7" * 64), V.DIVERGED),
    "weights that are no digest": case(report(weights="x" * 64), V.MALFORMED),
    "more right than tokens": case(evaluation(correct=10**11), V.MALFORMED),
    "more examples than tokens": case(evaluation(examples=10**11), V.MALFORMED),
    "new tokens that are not there": case(evaluation(new_tokens=10**11), V.MALFORMED),
    "a loss that the tokens cannot have": case(evaluation(loss_sum=1e14), V.MALFORMED),
    "a negative sum": case(evaluation(loss_sum=-1.0), V.MALFORMED),
    "no envelope": case(around(lambda found, t: found.pop("envelope")), V.MALFORMED),
    **{f"{type(value).__name__} as envelope": case(whole_envelope(value), V.MALFORMED)
       for value in ENVELOPES},
    "a second tensor": case(around(lambda f, t: t.update(more=torch.ones(2))), V.MALFORMED),
    "a body of floats": case(
        around(lambda f, t: t.update(body=t["body"].float())), V.MALFORMED),
    "a body in two dimensions": case(around(lambda f, t: t.update(body=t["body"][None])),
                                     V.MALFORMED),
    "no body": case(around(lambda f, t: t.clear()), V.MALFORMED),
    "one bit of the body": case(
        around(lambda f, t: t["body"].__setitem__(40, t["body"][40] ^ 1)), V.MALFORMED),
}  # fmt: skip

RESOURCES = {
    "more bytes than are allowed": case(
        lambda reply, specimen: around(
            lambda f, t: t.update(
                body=torch.zeros(most_bytes(specimen.context), dtype=torch.uint8)
            )
        )(reply, specimen), V.TOO_LARGE),
    "an envelope of 100 KB": case(envelope(run="r" * 100_000), V.MALFORMED),
    "a report of 100 KB": case(report(notes="r" * 100_000), V.MALFORMED),
    "an envelope in an envelope": case(
        lambda reply, _: raw(b'{"__metadata__":{"fedbraid":"' + b"[" * 30_000 + b'"}}'),
        V.MALFORMED),
    "30,000 tensors without a byte": case(
        inside(raw({"__metadata__": META} | {
            str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(9000)})),
        V.MALFORMED, V.WRONG_FAMILY, V.TOO_LARGE, layer=INSIDE),
}  # fmt: skip

CATALOGUE: dict[str, dict[str, Case]] = {
    "values": VALUES | TYPES,
    "shapes": SHAPES,
    "updates": UPDATES,
    "containers": CONTAINERS,
    "protocol": PROTOCOL,
    "resources": RESOURCES,
}


def judge_case(one: Case, specimen: Specimen) -> Verdict | None:
    """The verdict on a case, None where it passes. Any other exception is a hole in the gate.

    A family that no plan asks for is refused by its name, whatever is in it; what is wrong inside is
    then for ``decode`` to say, which has no plan and no norms.
    """
    payload = one.damage(specimen.reply(), specimen)
    try:
        admit(payload, specimen.context)
    except UpdateRejected as rejection:
        verdict = rejection.verdict
    else:
        return None
    if specimen.direct and one.layer == INSIDE:
        try:
            decode(open_body(payload), LAYOUT)
        except UpdateRejected as rejection:
            verdict = rejection.verdict
    return verdict


def expected_of(one: Case, specimen: Specimen) -> frozenset[Verdict]:
    """The verdicts that say what is wrong with a case."""
    inside = specimen.direct and one.layer == INSIDE
    return one.expected | ({Verdict.WRONG_FAMILY} if inside else frozenset())


def survey() -> dict[str, dict[str, Counter[str]]]:
    """By section and family: how many cases there are, "typed", "expected", and "raised" otherwise."""
    found: dict[str, dict[str, Counter[str]]] = {}
    families = specimens()
    for name, section in CATALOGUE.items():
        found[name] = {family: Counter() for family in families}
        for family, specimen in families.items():
            counts = found[name][family]
            for one in section.values():
                counts["cases"] += 1
                try:
                    verdict = judge_case(one, specimen)
                except Exception:  # What is looked for.
                    counts["raised"] += 1
                else:
                    counts["typed"] += verdict is not None
                    counts["expected"] += verdict in expected_of(one, specimen)
    return found


def main_command() -> None:
    """Show every case to every family: how many got a verdict of those that say what is wrong."""
    found = survey()
    families = list(specimens())
    table = Table("cases", "", *families)
    sound = True
    for name, by_family in found.items():
        cells = []
        for family in families:
            counts = by_family[family]
            sound &= counts["expected"] == counts["cases"] == counts["typed"]
            cells.append(
                f"{counts['expected']}" + f", {counts['raised']} raised" * (counts["raised"] > 0)
            )
        table.add_row(name, str(len(CATALOGUE[name])), *cells)
    total = sum(len(section) for section in CATALOGUE.values())
    sums = [str(sum(found[name][family]["expected"] for name in found)) for family in families]
    table.add_row("all", str(total), *sums)
    table_console().print(table)
    raise typer.Exit(0 if sound else 1)


if __name__ == "__main__":
    typer.run(main_command)
