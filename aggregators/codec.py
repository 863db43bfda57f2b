"""Updates as bytes and back: one safetensors buffer with canonical JSON metadata, never pickle.

``decode`` is a trust boundary: on any bytes whatever it returns an update or raises UpdateRejected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from aggregators.dense import Dense
from aggregators.factor_scalars import FactorScalars
from aggregators.layout import Layout
from aggregators.low_rank import LowRank
from aggregators.pair import Pair
from aggregators.probe_codec import (
    factor_scalars_parts,
    projected_parts,
    read_factor_scalars,
    read_projected,
    read_seed_scalars,
    seed_scalars_parts,
)
from aggregators.projected import ProjectedGradient
from aggregators.seed_scalars import SeedScalars
from aggregators.sketch import Sketch
from aggregators.sketch_codec import read_sketch, sketch_parts
from aggregators.update import Update, UpdateRejected, Verdict

SCHEMA = 1
METADATA_KEY = "fedbraid"
HEADER_LIMIT = 16 << 20
WIRE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
INT8_STEPS = 127

Header = dict[str, Any]


def pack(header: Header, tensors: dict[str, Tensor]) -> bytes:
    """One safetensors buffer: tensors sorted by name, ``header`` as canonical JSON metadata."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    ordered: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        # safetensors refuses tensors that share memory, as two layers' factors may.
        storage = tensor.untyped_storage().data_ptr()
        ordered[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return save_tensors(ordered, metadata={METADATA_KEY: text})


def unpack(data: bytes, max_bytes: int | None = None) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of a buffer that ``pack`` wrote. Raises UpdateRejected for anything else.

    Every tensor gets memory of its own: a buffer's tensors lie at any alignment, and the alignment
    decides how some kernels order their sums.
    """
    header = read_header(data, max_bytes)
    try:
        tensors = {name: tensor.clone() for name, tensor in load_tensors(data).items()}
    except Exception as error:  # A library that parses hostile bytes may raise anything.
        raise UpdateRejected(Verdict.MALFORMED, f"unreadable tensors: {error}") from None
    return header, tensors


def read_header(data: bytes, max_bytes: int | None = None, limit: int = HEADER_LIMIT) -> Header:
    """The header alone, of at most ``limit`` bytes; of the tensors nothing is read."""
    if max_bytes is not None and len(data) > max_bytes:
        raise UpdateRejected(
            Verdict.TOO_LARGE, f"{len(data)} bytes exceed the limit of {max_bytes}"
        )
    if len(data) < 8:
        raise UpdateRejected(Verdict.MALFORMED, f"{len(data)} bytes are too few for a header")
    size = int.from_bytes(data[:8], "little")
    if size > min(limit, len(data) - 8):
        raise UpdateRejected(Verdict.MALFORMED, f"the header claims {size} bytes")
    return _parse_header(data[8 : 8 + size])


def _parse_header(data: bytes) -> Header:
    try:
        outer = json.loads(data)
        header = json.loads(outer["__metadata__"][METADATA_KEY], parse_constant=_refuse)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UpdateRejected(Verdict.MALFORMED, f"unreadable header: {error}") from None
    if not isinstance(header, dict):
        raise UpdateRejected(Verdict.MALFORMED, "the header is not a JSON object")
    return header


def encode(update: Update, dtype: str | None = None) -> bytes:
    """An update as bytes: lossless by default, or with float32, bfloat16, float16 or int8 values.

    int8 is symmetric with one float32 scale per rank component (Dense: per row). Scalars and
    coordinates in float16 and int8 are relative to the largest of their vector, tensor or column.
    """
    header, tensors = update_parts(update, dtype)
    return pack(header, tensors)


def decode(data: bytes, layout: Layout, *, max_bytes: int | None = None) -> Update:
    """The update that bytes describe, in ``layout``. Raises UpdateRejected and nothing else."""
    header, tensors = unpack(data, max_bytes)
    return update_from_parts(header, tensors, layout)


def update_parts(update: Update, dtype: str | None = None) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of an update, for an envelope that carries more beside them."""
    if dtype is not None and dtype not in WIRE_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(WIRE_DTYPES)}")
    header = {"schema": SCHEMA, "family": update.family, "layout": update.layout.fingerprint}
    tensors: dict[str, Tensor] = {}
    if isinstance(update, LowRank):
        for name, factors in update.factors.items():
            _put(tensors, f"{name}#B", factors.B, dtype, dim=0)
            _put(tensors, f"{name}#A", factors.A, dtype, dim=1)
            tensors[f"{name}#scale"] = _collapsed(factors.scale)
    elif isinstance(update, Dense):
        for name, tensor in update.tensors.items():
            _put(tensors, f"{name}#D", tensor, dtype, dim=-1)
    elif isinstance(update, SeedScalars):
        fields, tensors = seed_scalars_parts(update, dtype)
        header |= fields
    elif isinstance(update, FactorScalars):
        fields, tensors = factor_scalars_parts(update, dtype)
        header |= fields
    elif isinstance(update, ProjectedGradient):
        fields, tensors = projected_parts(update, dtype)
        header |= fields
    elif isinstance(update, Sketch):
        fields, tensors = sketch_parts(update, dtype)
        header |= fields
    elif isinstance(update, Pair):
        described = []
        for place, part in enumerate(update.parts):
            fields, own = update_parts(part, dtype)
            described.append(fields)
            tensors |= {f"{place}.{key}": tensor for key, tensor in own.items()}
        header["parts"] = described
    else:
        raise TypeError(f"no codec for the family {update.family!r}")
    return header, tensors


def update_from_parts(header: Header, tensors: dict[str, Tensor], layout: Layout) -> Update:
    """Check header and tensors and build the update. Raises UpdateRejected and nothing else."""
    if header.get("family") == Pair.family:
        parts = pair_parts(header, tensors, layout)
        return made_pair([update_from_parts(*part, layout) for part in parts])
    check_header(header, layout)
    readers: dict[str, Callable[[Header, dict[str, Tensor], Layout], Update]] = {
        LowRank.family: _read_low_rank,
        Dense.family: _read_dense,
        SeedScalars.family: read_seed_scalars,
        FactorScalars.family: read_factor_scalars,
        ProjectedGradient.family: read_projected,
        Sketch.family: read_sketch,
    }
    family = header.get("family")
    if not isinstance(family, str) or family not in readers:
        raise UpdateRejected(Verdict.WRONG_FAMILY, f"unknown update family {family!r}")
    return readers[family](header, tensors, layout)


def pair_parts(
    header: Header, tensors: dict[str, Tensor], layout: Layout
) -> list[tuple[Header, dict[str, Tensor]]]:
    """Header and tensors of either part of a pair, unread. Raises UpdateRejected."""
    check_header(header, layout)
    described = header.get("parts")
    if not isinstance(described, list) or len(described) != 2:
        raise UpdateRejected(Verdict.MALFORMED, "a pair has two parts")
    found: list[tuple[Header, dict[str, Tensor]]] = []
    for place, fields in enumerate(described):
        if not isinstance(fields, dict) or fields.get("family") == Pair.family:
            raise UpdateRejected(Verdict.MALFORMED, "a part of a pair is no update")
        prefix = f"{place}."
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        found.append((fields, own))
    if sum(len(own) for _, own in found) != len(tensors):
        raise UpdateRejected(Verdict.UNKNOWN_TENSOR, "a tensor belongs to neither part of a pair")
    return found


def made_pair(parts: Sequence[Update]) -> Pair:
    """The pair of two updates. Raises UpdateRejected where they are none."""
    try:
        return Pair(parts)
    except ValueError as error:
        raise UpdateRejected(Verdict.WRONG_FAMILY, str(error)) from None


def check_header(header: Header, layout: Layout) -> None:
    """Refuse another schema or layout."""
    if header.get("schema") != SCHEMA:
        raise UpdateRejected(Verdict.MALFORMED, f"schema {header.get('schema')!r} is not {SCHEMA}")
    if header.get("layout") != layout.fingerprint:
        raise UpdateRejected(
            Verdict.WRONG_LAYOUT,
            f"layout {str(header.get('layout'))[:12]} is not the run's {layout.fingerprint[:12]}",
        )


def _read_low_rank(_: Header, tensors: dict[str, Tensor], layout: Layout) -> LowRank:
    parts = _grouped(tensors, layout, {"B", "A", "scale"}, {"B.s", "A.s"})
    factors = {}
    for name, found in parts.items():
        b = _get(found, "B", name, dim=0)
        a = _get(found, "A", name, dim=1)
        scale = found["scale"]
        if len(layout.shape(name)) != 2:
            raise UpdateRejected(Verdict.SHAPE, f"layer {name!r} is no matrix: no low-rank change")
        rows, columns = layout.shape(name)
        if b.ndim != 2 or a.ndim != 2 or b.shape[0] != rows or a.shape[1] != columns:
            raise UpdateRejected(
                Verdict.SHAPE,
                f"layer {name!r}: B {list(b.shape)} and A {list(a.shape)} do not fit"
                f" {[rows, columns]}",
            )
        if b.shape[1] != a.shape[0] or b.shape[1] < 1:
            raise UpdateRejected(
                Verdict.SHAPE, f"layer {name!r}: B has rank {b.shape[1]}, A has rank {a.shape[0]}"
            )
        if scale.dtype != torch.float64 or scale.ndim != 1:
            raise UpdateRejected(Verdict.DTYPE, f"layer {name!r}: scale must be a float64 vector")
        if scale.shape[0] not in (1, b.shape[1]):
            raise UpdateRejected(Verdict.SHAPE, f"layer {name!r}: {scale.shape[0]} scales")
        _finite(scale, name)
        factors[name] = (b, a, scale.expand(b.shape[1]).clone())
    return LowRank(layout, factors)


def _read_dense(_: Header, tensors: dict[str, Tensor], layout: Layout) -> Dense:
    found = {}
    for name, parts in _grouped(tensors, layout, {"D"}, {"D.s"}).items():
        tensor = _get(parts, "D", name, dim=-1)
        if tuple(tensor.shape) != layout.shape(name):
            raise UpdateRejected(
                Verdict.SHAPE,
                f"layer {name!r}: shape {list(tensor.shape)} is not {list(layout.shape(name))}",
            )
        found[name] = tensor
    return Dense(layout, found)


def _grouped(
    tensors: dict[str, Tensor], layout: Layout, required: set[str], optional: set[str]
) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("#")
        if name not in layout:
            raise UpdateRejected(Verdict.UNKNOWN_TENSOR, f"the layout has no tensor {name!r}")
        if part not in required | optional:
            raise UpdateRejected(Verdict.MALFORMED, f"layer {name!r}: unknown part {part!r}")
        groups.setdefault(name, {})[part] = tensor
    for name, parts in groups.items():
        missing = required - parts.keys()
        if missing:
            raise UpdateRejected(
                Verdict.MALFORMED, f"layer {name!r}: part {min(missing)!r} is missing"
            )
    return {name: groups[name] for name in sorted(groups, key=layout.tensor_id)}


def _put(tensors: dict[str, Tensor], key: str, value: Tensor, dtype: str | None, dim: int) -> None:
    if dtype is None:
        tensors[key] = value.detach()
        return
    if dtype != "int8":
        tensors[key] = value.detach().to(WIRE_DTYPES[dtype])
        return
    values = value.detach().float()
    largest = values.abs().amax(dim=dim, keepdim=True) if values.ndim else values.abs()
    step = largest / INT8_STEPS
    safe = torch.where(step > 0, step, torch.ones_like(step))
    tensors[key] = torch.round(values / safe).clamp(-INT8_STEPS, INT8_STEPS).to(torch.int8)
    tensors[f"{key}.s"] = step


def _get(parts: dict[str, Tensor], part: str, name: str, dim: int) -> Tensor:
    value, step = parts[part], parts.get(f"{part}.s")
    if value.dtype == torch.int8:
        if step is None or step.dtype != torch.float32:
            raise UpdateRejected(Verdict.DTYPE, f"layer {name!r}: int8 {part} without its scales")
        sizes = list(value.shape)
        if -len(sizes) <= dim < len(sizes):
            sizes[dim] = 1
        if list(step.shape) != sizes:
            raise UpdateRejected(Verdict.SHAPE, f"layer {name!r}: scales of {part} do not fit")
        _finite(step, name)
        value = value.float() * step
    elif step is not None:
        raise UpdateRejected(Verdict.MALFORMED, f"layer {name!r}: scales beside {value.dtype}")
    if not value.is_floating_point() or value.dtype not in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16,
    ):  # fmt: skip
        raise UpdateRejected(Verdict.DTYPE, f"layer {name!r}: {part} has the type {value.dtype}")
    _finite(value, name)
    return value


def _finite(value: Tensor, name: str) -> None:
    if not bool(torch.isfinite(value).all()):
        raise UpdateRejected(Verdict.NOT_FINITE, f"layer {name!r}: a value is NaN or infinite")


def _collapsed(scale: Tensor) -> Tensor:
    """One number where all are equal, bit for bit (-0.0 == 0.0): the usual case, and shorter."""
    bits = scale.contiguous().view(torch.int64)
    if bool((bits == bits[0]).all()):
        return scale[:1].clone()
    return scale


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")
