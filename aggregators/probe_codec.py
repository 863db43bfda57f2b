"""The wire form of the two families that live on probes: one vector of numbers each, not one a tensor.

A safetensors entry costs some 80 bytes of header, more than most tensors' coordinates. Numbers in
float16 and int8 are relative to the largest of their vector or tensor: steps and projections of a
large model are far below float16's smallest number, and would all be sent as 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fedkernels as fk
from aggregators.factor_scalars import LARGEST_RANK, FactorScalars
from aggregators.index_coding import decode_indices, encode_indices
from aggregators.layout import Layout
from aggregators.projected import ProjectedGradient
from aggregators.reach import EVERYTHING, Reach
from aggregators.seed_scalars import LARGEST_POOL, SeedScalars
from aggregators.shared_factors import factor_layout
from aggregators.statistics_codec import read_statistics, statistics_parts
from aggregators.update import UpdateRejected, Verdict

INT8_STEPS = 127
RELATIVE = (torch.float16, torch.int8)
LARGEST_COUNT = 1 << 20
TYPES = {
    None: torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


def seed_scalars_parts(update: SeedScalars, dtype: str | None) -> tuple[dict[str, Any], Any]:
    """Header fields and tensors of seed scalars."""
    header: dict[str, Any] = {
        "seed": update.master_seed,
        "pool": update.pool_size,
        "probe": update.probe,
    }
    if update.reach != EVERYTHING:
        header["reach"] = [update.reach.blocks, update.reach.density]
    sections = torch.tensor([len(update.scalars)])
    tensors = numbers_parts(update.scalars, sections, dtype)
    if (largest := tensors.pop("largest", None)) is not None:
        # A tensor of its own would cost three times the bytes; nine digits give float32 back.
        header["largest"] = float(f"{float(largest):.9g}")
    if update.names is not None:
        ids = [update.layout.tensor_id(name) for name in update.names]
        tensors["tensors"] = _as_tensor(len(ids).to_bytes(4, "little") + encode_indices(ids))
    if update.statistics is not None:
        header["statistics"], coded = statistics_parts(update.statistics, whole=dtype is None)
        tensors["statistics"] = _as_tensor(coded)
    return header, tensors | {"indices": _as_tensor(encode_indices(update.indices.tolist()))}


def read_seed_scalars(
    header: dict[str, Any], tensors: dict[str, Tensor], layout: Layout
) -> SeedScalars:
    """Seed scalars from what ``seed_scalars_parts`` wrote. Raises UpdateRejected alone."""
    seed, probe = _seed(header), _probe(header)
    pool = header.get("pool")
    if type(pool) is not int or not 1 <= pool <= LARGEST_POOL:
        raise UpdateRejected(Verdict.MALFORMED, f"a pool of {pool!r} seeds")
    only_parts(tensors, {"indices", "numbers", "tensors", "statistics"})
    coded, numbers = tensors.get("indices"), tensors.get("numbers")
    if coded is None or numbers is None:
        raise UpdateRejected(Verdict.MALFORMED, "seed scalars need coded indices and numbers")
    if numbers.ndim != 1 or len(numbers) > pool:
        raise UpdateRejected(
            Verdict.SHAPE, f"numbers {list(numbers.shape)} for a pool of {pool} seeds"
        )
    units = _units(header)
    scalars = read_numbers({"numbers": numbers} | units, torch.tensor([len(numbers)]))
    try:
        indices = decode_indices(_bytes(coded), len(numbers), pool)
        statistics = None
        if "statistics" in tensors:
            coded_statistics = _bytes(tensors["statistics"])
            statistics = read_statistics(header.get("statistics"), coded_statistics, pool, indices)
        return SeedScalars(
            layout, seed, pool, indices, scalars, probe, _scope(tensors.get("tensors"), layout),
            statistics, read_reach(header),
        )  # fmt: skip
    except ValueError as error:
        raise UpdateRejected(Verdict.MALFORMED, str(error)) from None


def factor_scalars_parts(update: FactorScalars, dtype: str | None) -> tuple[dict[str, Any], Any]:
    """Header fields and tensors of scalars along probes of factors."""
    header, tensors = seed_scalars_parts(update.scalars, dtype)
    ids = [update.layout.tensor_id(name) for name in update.names]
    header["factors"] = [update.rank, update.scale, update.shared_seed]
    tensors["matrices"] = _as_tensor(len(ids).to_bytes(4, "little") + encode_indices(ids))
    return header, tensors


def read_factor_scalars(
    header: dict[str, Any], tensors: dict[str, Tensor], layout: Layout
) -> FactorScalars:
    """What ``factor_scalars_parts`` wrote. Raises UpdateRejected alone."""
    described, coded = header.get("factors"), tensors.get("matrices")
    if not isinstance(described, list) or len(described) != 3 or coded is None:
        raise UpdateRejected(Verdict.MALFORMED, "factors need a rank, a scale, a seed and matrices")
    rank, scale, shared_seed = described
    if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
        raise UpdateRejected(Verdict.RANK, f"the rank {rank!r:.20} is none")
    rest = {name: tensor for name, tensor in tensors.items() if name != "matrices"}
    try:
        data = _bytes(coded)
        ids = decode_indices(data[4:], int.from_bytes(data[:4], "little"), len(layout))
        names = [layout.tensors[index].name for index in ids]
        own = factor_layout(layout, names, rank)
        scalars = read_seed_scalars(header, rest, own)
        return FactorScalars(layout, names, rank, scale, shared_seed, scalars)
    except ValueError as error:
        raise UpdateRejected(Verdict.MALFORMED, str(error)) from None


def read_reach(header: dict[str, Any]) -> Reach:
    """What the probes move, where the header says it. ValueError for what is none."""
    found = header.get("reach", [1, 1.0])
    if not isinstance(found, list) or len(found) != 2:
        raise ValueError("the reach of probes is a number of blocks and a density")
    return Reach(*found)


def _units(header: dict[str, Any]) -> dict[str, Tensor]:
    """What the numbers are relative to, float32 [1], where the header says it."""
    if "largest" not in header:
        return {}
    largest = header["largest"]
    if type(largest) not in (int, float) or not 0 <= largest < 1e300:
        raise UpdateRejected(Verdict.NOT_FINITE, f"the unit {largest!r:.20} is none")
    return {"largest": torch.tensor([largest], dtype=torch.float64).float()}


def _scope(coded: Tensor | None, layout: Layout) -> list[str] | None:
    """Names of the tensors that the probes reach; ValueError for bytes that name none."""
    if coded is None:
        return None
    data = _bytes(coded)
    ids = decode_indices(data[4:], int.from_bytes(data[:4], "little"), len(layout))
    if not 0 < len(ids) < len(layout):
        raise ValueError(f"{len(ids)} of {len(layout)} tensors is no part of them")
    return [layout.tensors[index].name for index in ids]


def projected_parts(update: ProjectedGradient, dtype: str | None) -> tuple[dict[str, Any], Any]:
    """Header fields and tensors of a projection."""
    header = {"seed": update.master_seed, "probe": update.probe}
    names = list(update.coordinates)
    ids = torch.tensor([update.layout.tensor_id(name) for name in names], dtype=torch.int32)
    counts = torch.tensor([len(update.coordinates[name]) for name in names], dtype=torch.int32)
    values = torch.cat([update.coordinates[name] for name in names] or [torch.zeros(0).double()])
    return header, numbers_parts(values, counts.long(), dtype) | {"ids": ids, "counts": counts}


def read_projected(
    header: dict[str, Any], tensors: dict[str, Tensor], layout: Layout
) -> ProjectedGradient:
    """A projection from what ``projected_parts`` wrote. Raises UpdateRejected alone."""
    seed, probe = _seed(header), _probe(header)
    only_parts(tensors, {"ids", "counts", "numbers", "largest"})
    ids, counts = tensors.get("ids"), tensors.get("counts")
    numbers = tensors.get("numbers")
    if ids is None or counts is None or numbers is None:
        raise UpdateRejected(Verdict.MALFORMED, "a projection needs ids, counts and numbers")
    if ids.dtype != torch.int32 or counts.dtype != torch.int32:
        raise UpdateRejected(Verdict.DTYPE, "ids and counts of a projection must be int32")
    if ids.ndim != 1 or ids.shape != counts.shape or numbers.ndim != 1:
        raise UpdateRejected(Verdict.SHAPE, "ids, counts and numbers of a projection do not fit")
    if bool((counts < 1).any()) or bool((counts > LARGEST_COUNT).any()):
        raise UpdateRejected(Verdict.SHAPE, f"a tensor has 1 to {LARGEST_COUNT} coordinates")
    if int(counts.long().sum()) != len(numbers):
        raise UpdateRejected(Verdict.SHAPE, f"{len(numbers)} numbers, not what the counts sum to")
    if bool((ids[1:] <= ids[:-1]).any()) or (
        len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < len(layout)
    ):
        raise UpdateRejected(Verdict.UNKNOWN_TENSOR, "tensor ids must ascend and be in the layout")
    values = read_numbers(tensors, counts.long())
    parts = torch.split(values, counts.tolist())
    names = [layout.tensors[index].name for index in ids.tolist()]
    try:
        return ProjectedGradient(layout, seed, dict(zip(names, parts, strict=True)), probe)
    except ValueError as error:
        raise UpdateRejected(Verdict.MALFORMED, str(error)) from None


def numbers_parts(values: Tensor, sections: Tensor, dtype: str | None) -> dict[str, Tensor]:
    """``values`` in the wire's type; a section is what shares one largest value."""
    kind = TYPES[dtype]
    if kind not in RELATIVE:
        return {"numbers": values.to(kind)}
    parts = torch.split(values, sections.tolist())
    largest = torch.tensor(
        [float(part.abs().max()) if len(part) else 0.0 for part in parts], dtype=torch.float32
    )
    unit = torch.where(largest > 0, largest, 1.0).double().repeat_interleave(sections)
    # Rounding the largest down to float32 could make a ratio exceed 1 by a hair; clamp takes it.
    ratios = (values / unit).clamp(-1.0, 1.0)
    numbers = (ratios * INT8_STEPS).round().to(kind) if kind is torch.int8 else ratios.to(kind)
    return {"numbers": numbers, "largest": largest}


def read_numbers(tensors: dict[str, Tensor], sections: Tensor) -> Tensor:
    """What ``numbers_parts`` wrote, float64. Raises UpdateRejected alone."""
    numbers, largest = tensors["numbers"], tensors.get("largest")
    if numbers.dtype not in TYPES.values():
        raise UpdateRejected(Verdict.DTYPE, f"numbers have the type {numbers.dtype}")
    values = numbers.double()
    if numbers.dtype in RELATIVE:
        if largest is None or largest.dtype != torch.float32 or largest.shape != sections.shape:
            raise UpdateRejected(Verdict.DTYPE, f"numbers in {numbers.dtype} without their units")
        if not bool(torch.isfinite(largest).all()):
            raise UpdateRejected(Verdict.NOT_FINITE, "a unit is NaN or infinite")
        unit = largest.double().repeat_interleave(sections)
        values = values * unit / (INT8_STEPS if numbers.dtype is torch.int8 else 1)
    elif largest is not None:
        raise UpdateRejected(Verdict.MALFORMED, f"units beside {numbers.dtype}")
    if not bool(torch.isfinite(values).all()):
        raise UpdateRejected(Verdict.NOT_FINITE, "a number is NaN or infinite")
    return values


def _seed(header: dict[str, Any]) -> int:
    seed = header.get("seed")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UpdateRejected(Verdict.MALFORMED, f"the master seed {seed!r} is none")
    return seed


def _probe(header: dict[str, Any]) -> str:
    probe = header.get("probe")
    if probe not in fk.PROBES:
        raise UpdateRejected(Verdict.MALFORMED, f"unknown probe {probe!r}")
    return str(probe)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(coded: Tensor) -> bytes:
    if coded.dtype != torch.uint8 or coded.ndim != 1:
        raise ValueError("coded indices are not a string of bytes")
    return bytes(coded.numpy().tobytes())


def only_parts(tensors: dict[str, Tensor], known: set[str]) -> None:
    """Refuse parts that a family does not have."""
    if unknown := sorted(tensors.keys() - known):
        raise UpdateRejected(Verdict.UNKNOWN_TENSOR, f"unknown part {unknown[0]!r}")
