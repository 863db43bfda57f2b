"""Probes on a GPU: `noise`, `perturb`, `replay_` and `project`, with the noise in registers.

Weights are read and written once, whatever the number of seeds. Replay sums integers, in 32 bits
where the coefficients cannot overflow them, and converts to float64 once. Projection keeps a
partial sum for each tile and seed, added up in a fixed order: no atomics, the same bits in every run.

The caller (`fedkernels/probes.py`, `fedkernels/replay.py`) has checked all arguments: tensors are
contiguous, and on one device. `rank1` probes are matrices, and have kernels of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fedkernels.gpu import rank1
from fedkernels.gpu.distributions import scaled_probe
from fedkernels.gpu.launching import launch
from fedkernels.gpu.placement import Placement, placement, signed, tile
from fedkernels.gpu.rounding import (
    as_pointer,
    fused_multiply_add,
    load_float,
    store_float,
)
from fedkernels.gpu.sums import float64_bits, partial_sums, seed_tensor, sum_type
from fedkernels.part import Part
from fedkernels.reference.probes import LARGEST, UNITS

_UNSPECIALIZED = ["seed", "seeds_count", "factor_bits", "tensor_id", "first_block", "skip"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def noise_kernel(
    out,
    seed: tl.int64,
    unit,
    tensor_id: tl.int64,
    first_block: tl.int64,
    skip,
    count: tl.int64,
    rows,
    columns,
    held: tl.int64,
    width: tl.int64,
    PROBE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """out = unit * q + 0, which makes -0 of Gaussian probes a +0; out: float32 [count]."""
    place = tile(first_block, skip, count, rows, columns, held, width, BLOCKS, WIDTH, ELEMENTS)
    block, position, local, inside = place
    unit = tl.to_tensor(unit)
    value = scaled_probe(unit, seed, tensor_id, block, position, PROBE, BLOCKS, WIDTH)
    tl.store(out + local, value + 0.0, mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def perturb_kernel(
    out,
    weight,
    seed: tl.int64,
    step,
    tensor_id: tl.int64,
    first_block: tl.int64,
    skip,
    count: tl.int64,
    rows,
    columns,
    held: tl.int64,
    width: tl.int64,
    PROBE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """out = fma(q, step, weight) in float32, rounded once more to the type of both; [count]."""
    place = tile(first_block, skip, count, rows, columns, held, width, BLOCKS, WIDTH, ELEMENTS)
    block, position, local, inside = place
    old = load_float(weight + local, inside)
    one = tl.to_tensor(1.0)
    probe = scaled_probe(one, seed, tensor_id, block, position, PROBE, BLOCKS, WIDTH)
    moved = fused_multiply_add(probe, tl.zeros_like(old) + step, old)
    store_float(out + local, moved, inside)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def replay_kernel(
    weight,
    seeds,
    coefficients,
    seeds_count,
    factor_bits: tl.int64,
    tensor_id: tl.int64,
    first_block: tl.int64,
    skip,
    count: tl.int64,
    rows,
    columns,
    held: tl.int64,
    width: tl.int64,
    PROBE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """weight = round(weight + factor * sum_k coefficients[k] q_k), the sum in numbers of type SUM.

    seeds: int64 [K] (bits of uint64); coefficients: int32 [K]; factor_bits: the bits of a float64,
    for a kernel's own floating-point arguments are float32.
    """
    place = tile(first_block, skip, count, rows, columns, held, width, BLOCKS, WIDTH, ELEMENTS)
    block, position, local, inside = place
    total = tl.zeros([BLOCKS, WIDTH], dtype=SUM)
    for k in range(seeds_count):
        seed = tl.load(seeds + k)
        coefficient = tl.load(coefficients + k).to(SUM)
        total += scaled_probe(coefficient, seed, tensor_id, block, position, PROBE, BLOCKS, WIDTH)
    factor = factor_bits.to(tl.int64).to(tl.float64, bitcast=True)
    old = load_float(weight + local, inside).to(tl.float64)
    store_float(weight + local, (old + total.to(tl.float64) * factor).to(tl.float32), inside)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def project_kernel(
    delta,
    seeds,
    partials,
    seeds_count,
    tensor_id: tl.int64,
    first_block: tl.int64,
    skip,
    count: tl.int64,
    rows,
    columns,
    held: tl.int64,
    width: tl.int64,
    PROBE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """partials[tile, k] = sum over the tile of delta * q_k; partials: float64 [tiles, K]."""
    place = tile(first_block, skip, count, rows, columns, held, width, BLOCKS, WIDTH, ELEMENTS)
    block, position, local, inside = place
    # In float64 throughout: a sum of random signs cancels, and what remains must be right to 1e-6.
    change = load_float(delta + local, inside).to(tl.float64)
    row = partials + tl.program_id(0).to(tl.int64) * seeds_count
    for k in range(seeds_count):
        seed = tl.load(seeds + k)
        product = scaled_probe(change, seed, tensor_id, block, position, PROBE, BLOCKS, WIDTH)
        tl.store(row + k, tl.sum(tl.sum(product, axis=0), axis=0))


def noise_(out: torch.Tensor, seed: int, tensor_id: int, probe: str, part: Part) -> None:
    """Write c * q at the elements of `part` into `out`: float32, contiguous."""
    probe = _effective(probe, part)
    if probe == "rank1":
        rank1.noise_(out, seed, tensor_id, part)
        return
    place = placement(part, out.numel(), probe, out.device)
    unit = float(torch.tensor(UNITS[probe], dtype=torch.float32))
    _launch(noise_kernel, place, out, signed(seed), unit, signed(tensor_id))


def perturb(
    out: torch.Tensor,
    weight: torch.Tensor,
    seed: int,
    step: float,
    tensor_id: int,
    probe: str,
    part: Part,
) -> None:
    """out = fma(q, step, weight); `step` is a float32 number, the scale times c.

    `out` may be the weight itself; else it has the weight's type and size.
    """
    probe = _effective(probe, part)
    if probe == "rank1":
        rank1.perturb(out, weight, seed, step, tensor_id, part)
        return
    place = placement(part, weight.numel(), probe, weight.device)
    arguments = (as_pointer(out), as_pointer(weight), signed(seed), step, signed(tensor_id))
    _launch(perturb_kernel, place, *arguments)


def replay_(
    weight: torch.Tensor,
    seeds: Sequence[int],
    coefficients: torch.Tensor,
    factor: float,
    tensor_id: int,
    probe: str,
    part: Part,
) -> None:
    """weight = round(weight + factor * sum_k coefficients[k] q_k) in place.

    coefficients: int32 [K]; factor: 2**exponent * c, a float64.
    """
    probe = _effective(probe, part)
    if probe == "rank1":
        rank1.replay_(weight, seeds, coefficients, factor, tensor_id, part)
        return
    place = placement(part, weight.numel(), probe, weight.device)
    _launch(
        replay_kernel,
        place,
        as_pointer(weight),
        seed_tensor(seeds, weight.device),
        coefficients.to(weight.device),
        len(seeds),
        float64_bits(factor),
        signed(tensor_id),
        SUM=tl.float64 if probe == "gaussian" else sum_type(coefficients, LARGEST[probe]),
    )


def project(
    delta: torch.Tensor, seeds: Sequence[int], tensor_id: int, probe: str, part: Part
) -> torch.Tensor:
    """Return <delta, c q_k> for every seed: float64 [K], on delta's device."""
    probe = _effective(probe, part)
    if probe == "rank1":
        return rank1.project(delta, seeds, tensor_id, part)
    place = placement(part, delta.numel(), probe, delta.device)

    def fill(some: torch.Tensor, partials: torch.Tensor) -> None:
        arguments = (as_pointer(delta), some, partials, len(some), signed(tensor_id))
        _launch(project_kernel, place, *arguments)

    return UNITS[probe] * partial_sums(seeds, place.tiles, delta.device, fill)


def _effective(probe: str, part: Part) -> str:
    """Return the probe of a tensor: a vector's rank1 probe is its Rademacher probe."""
    return "rademacher" if probe == "rank1" and len(part.shape) < 2 else probe


def _launch(kernel: Any, place: Placement, *arguments: Any, **constants: Any) -> None:
    device = arguments[0].device
    options = place.constants | constants
    launch(kernel, (place.tiles,), device, *arguments, *place.arguments, **options)
