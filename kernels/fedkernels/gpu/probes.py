"""Probes on a GPU: `noise`, `perturb_`, `replay_` and `project`, with the noise in registers.

Element i of a tensor (row-major) lies in counter i // WIDTH, so a program takes BLOCKS consecutive
counters. A stretch of a tensor that begins at element `first` begins `skip` = first % WIDTH
elements before its first counter's end: local index = counter * WIDTH + column - skip.

Weights are read and written once, whatever the number of seeds. Replay sums integers, in 32 bits
where the coefficients cannot overflow them, and converts to float64 once. Projection keeps a
partial sum a tile and seed, added up in a fixed order: no atomics, so the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fedkernels.gpu.philox import POPCOUNT, RADEMACHER, integers_times
from fedkernels.gpu.rounding import (
    INTERPRETED,
    as_pointer,
    fused_multiply_add,
    load_float,
    store_float,
)

PROBES = {"rademacher": RADEMACHER, "popcount": POPCOUNT}
WIDTHS = {"rademacher": 128, "popcount": 4}  # elements of one counter
UNIT = {"rademacher": 1.0, "popcount": 1 / math.sqrt(8)}  # what makes the variance one
LARGEST = {"rademacher": 1, "popcount": 16}  # of the probe's integers

# Elements of a program's tile. The interpreter's cost is per program and operation, not per element.
TILE = 8192
# Partial sums of a projection, float64: at most 64 MiB of them at once.
PARTIALS = 1 << 23


@triton.jit
def _tile(first_block, skip, count, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Return this program's counters [BLOCKS], its local indices and mask [BLOCKS, WIDTH]."""
    row = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    local = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :] - skip
    return first_block.to(tl.int64) + row, local, (local >= 0) & (local < count)


@triton.jit(do_not_specialize=["seed", "tensor_id", "first_block", "skip"])
def noise_kernel(
    out,
    seed: tl.int64,
    tensor_id: tl.int64,
    first_block: tl.int64,
    skip,
    count: tl.int64,
    unit,
    PROBE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out = unit * q; out: float32 or int8 [count]."""
    block, local, inside = _tile(first_block, skip, count, BLOCKS, WIDTH)
    value = integers_times(tl.to_tensor(unit), seed, tensor_id, block, PROBE, BLOCKS)
    tl.store(out + local, value, mask=inside)


@triton.jit(do_not_specialize=["seed", "tensor_id", "first_block", "skip"])
def perturb_kernel(
    weight,
    seed: tl.int64,
    scale,
    tensor_id: tl.int64,
    first_block: tl.int64,
    skip,
    count: tl.int64,
    PROBE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """weight = fma(q, scale, weight) in float32; weight: float32, float16 or int16 view [count]."""
    block, local, inside = _tile(first_block, skip, count, BLOCKS, WIDTH)
    old = load_float(weight + local, inside)
    one = tl.full([], 1.0, tl.float32)
    integers = integers_times(one, seed, tensor_id, block, PROBE, BLOCKS)
    store_float(weight + local, fused_multiply_add(integers, scale + tl.zeros_like(old), old), inside)


@triton.jit(do_not_specialize=["seeds_count", "scale_bits", "tensor_id", "first_block", "skip"])
def replay_kernel(
    weight,
    seeds,
    coefficients,
    seeds_count,
    scale_bits: tl.int64,
    tensor_id: tl.int64,
    first_block: tl.int64,
    skip,
    count: tl.int64,
    PROBE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM: tl.constexpr,
):
    """weight = round(weight + scale * sum_k coefficients[k] q_k); the sum in integers of type SUM.

    seeds: int64 [K] (bits of uint64); coefficients: int32 [K]; scale_bits: the bits of a float64,
    for a kernel's floating-point arguments are float32. Launch without contraction: the product is
    rounded before it is added.
    """
    block, local, inside = _tile(first_block, skip, count, BLOCKS, WIDTH)
    total = tl.zeros([BLOCKS, WIDTH], dtype=SUM)
    for k in range(seeds_count):
        seed = tl.load(seeds + k)
        coefficient = tl.load(coefficients + k).to(SUM)
        total += integers_times(coefficient, seed, tensor_id, block, PROBE, BLOCKS)
    scale = scale_bits.to(tl.int64).to(tl.float64, bitcast=True)
    old = load_float(weight + local, inside).to(tl.float64)
    store_float(weight + local, (old + total.to(tl.float64) * scale).to(tl.float32), inside)


@triton.jit(do_not_specialize=["seeds_count", "tensor_id", "first_block", "skip"])
def project_kernel(
    delta,
    seeds,
    partials,
    seeds_count,
    tensor_id: tl.int64,
    first_block: tl.int64,
    skip,
    count: tl.int64,
    PROBE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """partials[tile, k] = sum over the tile of delta * q_k; partials: float64 [tiles, K]."""
    block, local, inside = _tile(first_block, skip, count, BLOCKS, WIDTH)
    # In float64 throughout: a sum of random signs cancels, and what remains must be right to 1e-6.
    change = load_float(delta + local, inside).to(tl.float64)
    row = partials + tl.program_id(0).to(tl.int64) * seeds_count
    for k in range(seeds_count):
        seed = tl.load(seeds + k)
        product = integers_times(change, seed, tensor_id, block, PROBE, BLOCKS)
        tl.store(row + k, tl.sum(tl.sum(product, axis=0), axis=0))


def noise_(out: torch.Tensor, seed: int, tensor_id: int, probe: str, first: int = 0) -> None:
    """Write elements first, first + 1, ... of a probe into `out`, float32 and contiguous."""
    unit = float(torch.tensor(UNIT[probe], dtype=torch.float32))
    constants, place = _placement(out.numel(), probe, first)
    if out.numel():
        arguments = (_signed(seed), _signed(tensor_id), *place, unit)
        noise_kernel[_grid(place, constants)](out, *arguments, **constants)


def perturb_(
    weight: torch.Tensor, seed: int, scale: float, tensor_id: int, probe: str, first: int = 0
) -> None:
    """Add scale * z to `weight`, elements first, first + 1, ... of its tensor, in place."""
    constants, place = _placement(weight.numel(), probe, first)
    if weight.numel():
        single = float(torch.tensor(scale * UNIT[probe], dtype=torch.float32))
        arguments = (_signed(seed), single, _signed(tensor_id), *place)
        perturb_kernel[_grid(place, constants)](as_pointer(weight), *arguments, **constants)


def replay_(
    weight: torch.Tensor,
    seeds: Sequence[int],
    coefficients: torch.Tensor,
    exponent: int,
    tensor_id: int,
    probe: str,
    first: int = 0,
) -> None:
    """Add 2**exponent * sum_k coefficients[k] * z_k to `weight` in place, with one rounding.

    coefficients: int32 [K].
    """
    constants, place = _placement(weight.numel(), probe, first)
    if not weight.numel():
        return
    device = weight.device
    kernel_sum = sum_type(coefficients, LARGEST[probe])
    scale = torch.tensor(math.ldexp(1.0, exponent) * UNIT[probe], dtype=torch.float64)
    replay_kernel[_grid(place, constants)](
        as_pointer(weight),
        seed_tensor(seeds, device),
        coefficients.to(device),
        len(seeds),
        int(scale.view(torch.int64)),
        _signed(tensor_id),
        *place,
        **constants,
        SUM=kernel_sum,
        enable_fp_fusion=False,
    )


def project(
    delta: torch.Tensor, seeds: Sequence[int], tensor_id: int, probe: str, first: int = 0
) -> torch.Tensor:
    """Return <delta, z_k> for every seed: float64 [K], on delta's device."""
    constants, place = _placement(delta.numel(), probe, first)
    (tiles,) = _grid(place, constants)
    result = torch.zeros(len(seeds), dtype=torch.float64, device=delta.device)
    at_once = max(1, PARTIALS // max(1, tiles))
    for start in range(0, len(seeds) if delta.numel() else 0, at_once):
        some = seed_tensor(seeds[start : start + at_once], delta.device)
        partials = torch.empty(tiles, len(some), dtype=torch.float64, device=delta.device)
        arguments = (len(some), _signed(tensor_id), *place)
        project_kernel[(tiles,)](as_pointer(delta), some, partials, *arguments, **constants)
        result[start : start + at_once] = partials.sum(dim=0)
    return result * UNIT[probe]


def sum_type(coefficients: torch.Tensor, largest: int) -> tl.dtype:
    """Return the integer type that holds every sum of coefficients times -largest .. largest."""
    bound = int(coefficients.to(torch.int64).abs().sum()) * largest
    return tl.int32 if bound < 2**31 else tl.int64


def seed_tensor(seeds: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return seeds in [0, 2**64) as the int64 tensor with their bits."""
    return torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64).to(device)


def _signed(value: int) -> int:
    """Return the signed 64-bit integer with the bits of `value`."""
    return value - 2**64 if value >= 2**63 else value


def _placement(count: int, probe: str, first: int) -> tuple[dict[str, int], tuple[int, int, int]]:
    """Return a launch's constants, and (first counter, elements to skip in it, elements)."""
    width = WIDTHS[probe]
    # Small tensors get small tiles: one tile of 8,192 for a norm's 64 weights is mostly mask.
    blocks = min(TILE, triton.next_power_of_2(count + width)) // width
    constants = {"PROBE": PROBES[probe].value, "BLOCKS": max(blocks, 16), "WIDTH": width}
    return constants, (_signed(first // width), first % width, count)


def _grid(place: tuple[int, int, int], constants: dict[str, int]) -> tuple[int]:
    _, skip, count = place
    return (triton.cdiv(skip + count, constants["BLOCKS"] * constants["WIDTH"]),)
