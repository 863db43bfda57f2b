"""Random damage to honest updates of every family, on codec and gate: how many uncaught exceptions?

    python -m simulations.benchmarks.fuzz --examples 100000

A fifth of the examples are Hypothesis's: well-formed containers of ill-chosen headers, types, shapes and
values. The others are mutations of honest bytes: bits, bytes, cuts, repeats and numbers, in the reply or
in the update under a digest that fits; and of honest updates: types, shapes, values, names and fields.
"""

from __future__ import annotations

import json
import math
import random
import struct
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.table import Table

from aggregators import Update, UpdateRejected, admit, decode
from aggregators.codec import METADATA_KEY, pack, unpack
from aggregators.cohort import Cohort
from aggregators.cohort_codec import read_cohort
from aggregators.gate import norm_of
from aggregators.messages import open_body
from simulations.benchmarks.specimens import (
    LAYOUT,
    NORM,
    QUERY,
    Specimen,
    content,
    specimens,
    with_body,
)
from simulations.benchmarks.tables import table_console

TYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "F64": 8, "I64": 8, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "F4": 1, "X": 4,
}  # fmt: skip
PARTS = ("numbers", "largest", "indices", "tensors", "ids", "counts", "widths", "whole")
FAMILIES = ("low_rank", "dense", "seed_scalars", "projected_gradient", "sketch", "cohort")
FILLS = (b"\0", b"\1", b"\x7f", b"\xff", b"\x3c", b"\x80", b"\0\0\x80\x3f", b"\1\0\0\0\2\0\0\0")
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int32, torch.int64,
    torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
NUMBERS = (math.nan, math.inf, -math.inf, 0.0, 1e-310, 1e30, 1e300, -1.0, 2.0**31, 2.0**62, 64.0)
STRANGE: tuple[Any, ...] = (
    0, 1, -1, 9, 64, 2**24, 2**31, 2**63, 1e300, 0.5, -0.0, None, True, "", "\0", "1", [1], [], {},
)  # fmt: skip
# What structure is made of: a flip that lands on these reaches further than most.
TELLING = b'\0\xff09-"{}[]:,.e#BAsD'


@dataclass
class Found:
    """What came of the examples: verdicts, and whatever escaped, by where it was raised."""

    outcomes: Counter[str] = field(default_factory=Counter)
    escaped: dict[str, str] = field(default_factory=dict)
    failures: int = 0

    def judge(self, read: Callable[[], Any]) -> None:
        """Count one example."""
        try:
            read()
        except UpdateRejected as rejection:
            self.outcomes[rejection.verdict.value] += 1
        except Exception as error:
            self.failures += 1
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}"
            self.escaped.setdefault(f"{type(error).__name__} at {place}", str(error)[:200])
        else:
            self.outcomes["passed"] += 1


def fuzz(examples: int, seed_number: int) -> Found:
    """Try so many examples, the same for the same seed."""
    found = Found()
    families = list(specimens().values())
    replies = {one.family: one.reply() for one in families}
    drawn = max(1, examples // 5)
    _try_structures(found, families, replies, drawn, seed_number)
    chance = random.Random(seed_number)
    # Hypothesis ends early where it has tried everything, so what counts is what was tried.
    while found.outcomes.total() + found.failures < examples:
        specimen = chance.choice(families)
        reply = replies[specimen.family]
        kind = chance.randrange(3)
        if kind == 0:
            found.judge(_reader(specimen, damaged(reply, chance), whole=True))
            continue
        body = open_body(reply)
        body = damaged(body, chance) if kind == 1 else rearranged(body, chance)
        whole = not specimen.direct and chance.random() < 0.7
        found.judge(_reader(specimen, body, whole=whole, reply=reply))
    return found


def rearranged(body: bytes, chance: random.Random) -> bytes:
    """An update after one to three changes that leave its container well-formed."""
    header, tensors = unpack(body)
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.3:
            header[chance.choice([*header, "largest"])] = chance.choice(STRANGE)
            continue
        if not tensors:
            break
        name = chance.choice(list(tensors))
        tensor = tensors[name]
        kind = chance.choice(["value", "value", "type", "shape", "length", "name", "gone", "order"])
        if kind == "value" and tensor.numel():
            values = tensor.clone().view(-1)
            number = chance.choice(NUMBERS)
            values[chance.randrange(len(values))] = torch.tensor(number).to(tensor.dtype)
            tensors[name] = values.reshape(tensor.shape)
        elif kind == "type" and not tensor.is_complex():
            tensors[name] = tensor.to(chance.choice(DTYPES))
        elif kind == "shape":
            tensors[name] = chance.choice([tensor[None], tensor.flatten(), tensor[..., None]])
        elif kind == "length" and tensor.ndim:
            count = chance.randint(0, 2 * len(tensor))
            tensors[name] = torch.cat([tensor, tensor])[:count]
        elif kind == "name":
            tensors[chance.choice([*PARTS, f"{QUERY}#A", f"{NORM}#D", f"{name}.s"])] = tensor
        elif kind == "gone":
            del tensors[name]
        elif kind == "order":
            tensors[name] = tensor.flip(0) if tensor.ndim else tensor
    return pack(header, tensors)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Some bytes after one to four mutations."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        header = min(len(found), 8 + int.from_bytes(found[:8], "little"))
        # A third of the damage goes where the structure is, a third where the numbers are.
        first, end = chance.choice([(0, header), (0, len(found)), (header, len(found))])
        at = chance.randrange(first, max(first + 1, end))
        kind = chance.choice(["flip", "flip", "set", "cut", "insert", "remove", "repeat", "number"])
        if kind == "flip" and at < len(found):
            found[at] ^= 1 << chance.randrange(8)
        elif kind == "set" and at < len(found):
            found[at] = chance.choice(TELLING)
        elif kind == "cut":
            del found[at:]
        elif kind == "insert":
            found[at:at] = chance.randbytes(chance.randint(1, 8))
        elif kind == "remove":
            del found[at : at + chance.randint(1, 16)]
        elif kind == "repeat":
            found[at:at] = found[at : at + chance.randint(1, 64)]
        else:
            width = chance.choice([1, 2, 4, 8])
            value = chance.choice([0, 1, 2**31 - 1, 2**63 - 1, 2**64 - 1, chance.getrandbits(64)])
            found[at : at + width] = (value % 256**width).to_bytes(width, "little")
    return bytes(found)


def _reader(
    specimen: Specimen, data: bytes, *, whole: bool, reply: bytes = b""
) -> Callable[[], None]:
    """How an example is read: as a reply at the gate, as the body of one, or as an update alone."""

    def read() -> None:
        update: Update | Cohort | None
        if whole:
            payload = with_body(reply, data) if reply else data
            update = admit(payload, specimen.context).update
        elif specimen.family == Cohort.family:
            update = read_cohort(*unpack(data, specimen.context.max_bytes), LAYOUT)
        else:
            update = decode(data, LAYOUT, max_bytes=specimen.context.max_bytes)
        if update is not None:
            # What passes is an update: it can be sent on, and its norm is a number.
            content(update)
            norm = norm_of(update) if isinstance(update, Cohort) else update.squared_norm() ** 0.5
            assert not whole or math.isfinite(norm)

    return read


def _try_structures(
    found: Found, families: list[Specimen], replies: dict[str, bytes], examples: int, number: int
) -> None:
    by_family = {one.family: one for one in families}

    @seed(number)
    @settings(
        max_examples=max(1, examples),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(header=HEADERS, tensors=TENSORS, whole=st.booleans())
    def attempt(header: dict[str, Any], tensors: dict[str, Any], whole: bool) -> None:
        specimen = by_family.get(header["family"], families[0])
        reply = replies[specimen.family]
        data = container(header, tensors)
        found.judge(_reader(specimen, data, whole=whole, reply=reply))

    attempt()


KEYS = st.one_of(
    st.sampled_from(PARTS),
    st.builds(
        "{}#{}".format,
        st.sampled_from([*(spec.name for spec in LAYOUT), "other", ""]),
        st.sampled_from(["B", "A", "scale", "B.s", "A.s", "D", "D.s", "", "X"]),
    ),
    st.text(max_size=4),
)
ODD = st.sampled_from(STRANGE)
HEADERS = st.fixed_dictionaries(
    {"family": st.sampled_from([*FAMILIES, "x"])},
    optional={
        "seed": ODD | st.just(9),
        "pool": ODD | st.just(64),
        "probe": ODD | st.sampled_from(["rank1", "rademacher", "gaussian"]),
        "basis": ODD | st.just("0" * 64),
        "largest": ODD,
        "a": ODD,
        "schema": ODD,
        "layout": ODD,
        "totals": ODD | st.lists(ODD, max_size=2),
        "members": ODD | st.lists(ODD, max_size=2),
    },
)
TENSORS = st.dictionaries(
    KEYS,
    st.tuples(
        st.sampled_from(list(TYPES)),
        st.lists(st.sampled_from([0, 1, 2, 3, 5, 6, 10, 12, 14]), max_size=3),
        st.sampled_from(FILLS),
    ),
    max_size=5,
)


def container(header: dict[str, Any], tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A well-formed container, whatever is in it."""
    inner = {"schema": 1, "layout": LAYOUT.fingerprint} | header
    outer: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(inner)}}
    content = b""
    for key, (kind, shape, fill) in tensors.items():
        size = TYPES[kind] * math.prod(shape)
        outer[key] = {
            "dtype": kind, "shape": shape, "data_offsets": [len(content), len(content) + size],
        }  # fmt: skip
        content += (fill * (size // len(fill) + 1))[:size]
    text = json.dumps(outer).encode()
    return struct.pack("<Q", len(text)) + text + content


def main(
    examples: Annotated[int, typer.Option(min=2)] = 100_000,
    seed_number: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Damage updates at random and count what escapes codec and gate."""
    console = table_console()
    started = time.perf_counter()
    found = fuzz(examples, seed_number)
    table = Table("outcome", "examples")
    for outcome, count in found.outcomes.most_common():
        table.add_row(outcome, f"{count:,}")
    table.add_row("uncaught exceptions", f"{found.failures:,}")
    table.add_row("all", f"{found.outcomes.total() + found.failures:,}")
    console.print(table)
    for place, words in found.escaped.items():
        console.print(f"{place}: {words}", markup=False)
    console.print(f"{time.perf_counter() - started:.0f} s, seed {seed_number}")
    raise typer.Exit(1 if found.failures else 0)


if __name__ == "__main__":
    typer.run(main)
