"""Probes of rank one: z[i, j] = u[i] v[j], with signs u and v from two Rademacher streams.

The signs of a seed are few, so they are written out once as bytes, [K, rows] and [K, columns]; what
follows is matrix products. Replaying K seeds is U' diag(coefficients) V: the coefficients are split
into digits that fit a byte, and tensor cores multiply bytes exactly into int32. Projecting is the
diagonal of U delta V', float32 products summed in float64.

A weight is seen as rows of `held` columns, of which the first may begin `lead` elements before the
weight does (a shard that begins within a row): local index = row * held + column - lead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fedkernels.gpu.distributions import RADEMACHER, scaled_probe
from fedkernels.gpu.launching import launch
from fedkernels.gpu.placement import held_columns, held_rows, signed
from fedkernels.gpu.rounding import as_pointer, fused_multiply_add, load_float, store_float
from fedkernels.gpu.sums import float64_bits, partial_sums, seed_tensor
from fedkernels.part import Part

ROW_STREAM = -(2**63)  # first counters of the streams, as signed integers
COLUMN_STREAM = -(2**62)
ROWS, COLUMNS, SEEDS = 64, 64, 64  # of a tile
PROJECTED_SEEDS = 16
# Balanced digits of a coefficient, -64 .. 64: times a sign, each fits a byte.
DIGIT_BITS = tl.constexpr(7)
# A digit's sum over this many seeds stays below 2**31.
MOST_SEEDS = 2**24


@dataclass(frozen=True)
class Matrix:
    """A weight of `count` elements as rows and columns of a whole tensor."""

    rows: torch.Tensor  # indices in the whole tensor: int64 [rows]
    columns: torch.Tensor
    lead: int
    count: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self.columns), self.lead, self.count

    @property
    def grid(self) -> tuple[int, int]:
        return triton.cdiv(len(self.rows), ROWS), triton.cdiv(len(self.columns), COLUMNS)


def matrix(part: Part, count: int, device: torch.device) -> Matrix:
    """Return the rows and columns that the `count` elements of a part lie in."""
    if part.selects:
        return Matrix(held_rows(part).to(device), held_columns(part).to(device), 0, count)
    width = max(1, part.width)
    first, lead = divmod(part.offset, width)
    rows = torch.arange(first, first + triton.cdiv(lead + count, width), device=device)
    return Matrix(rows, torch.arange(width, device=device), lead, count)


@triton.jit(do_not_specialize=["tensor_id", "stream"])
def signs_kernel(
    out, seeds, indices, count: tl.int64, tensor_id: tl.int64, stream: tl.int64, TILE: tl.constexpr
):
    """out[k, i] = sign number indices[i] of a seed's stream; out: int8 [K, count]."""
    # seeds along x: a grid's y may have only 65,535 programs
    local = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    seed = tl.load(seeds + tl.program_id(0))
    index = tl.load(indices + local, mask=local < count, other=0)
    block = stream.to(tl.int64) + index // 128
    position = (index % 128).to(tl.int32)
    one = tl.full([], 1, tl.int32)
    sign = scaled_probe(one, seed, tensor_id, block, position, RADEMACHER, TILE, 1)
    where = out + tl.program_id(0).to(tl.int64) * count + local
    tl.store(where[:, None], sign.to(tl.int8), mask=(local < count)[:, None])


@triton.jit
def _matrix_tile(held, lead, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return this program's rows [ROWS], columns [COLUMNS], local indices and mask."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    local = row[:, None] * held + column[None, :] - lead
    inside = (column[None, :] < held) & (local >= 0) & (local < count)
    return row, column, local, inside


@triton.jit
def noise_kernel(
    out,
    row_signs,
    column_signs,
    rows: tl.int64,
    held: tl.int64,
    lead: tl.int64,
    count: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = u v'; out: float32 [count]."""
    row, column, local, inside = _matrix_tile(held, lead, count, ROWS, COLUMNS)
    u = tl.load(row_signs + row, mask=row < rows, other=0).to(tl.float32)
    v = tl.load(column_signs + column, mask=column < held, other=0).to(tl.float32)
    tl.store(out + local, u[:, None] * v[None, :], mask=inside)


@triton.jit
def perturb_kernel(
    out,
    weight,
    row_signs,
    column_signs,
    step,
    rows: tl.int64,
    held: tl.int64,
    lead: tl.int64,
    count: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = fma(u v', step, weight) in float32, rounded once more to the type of both; [count]."""
    row, column, local, inside = _matrix_tile(held, lead, count, ROWS, COLUMNS)
    u = tl.load(row_signs + row, mask=row < rows, other=0).to(tl.float32)
    v = tl.load(column_signs + column, mask=column < held, other=0).to(tl.float32)
    old = load_float(weight + local, inside)
    moved = fused_multiply_add(u[:, None] * v[None, :], tl.zeros_like(old) + step, old)
    store_float(out + local, moved, inside)


@triton.jit(do_not_specialize=["seeds_count", "factor_bits"])
def replay_kernel(
    weight,
    row_signs,
    column_signs,
    digits,
    seeds_count,
    factor_bits: tl.int64,
    rows: tl.int64,
    held: tl.int64,
    lead: tl.int64,
    count: tl.int64,
    DIGITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEEDS: tl.constexpr,
):
    """weight = round(weight + factor * sum_k coefficients[k] u_k v_k'); digits: int8 [DIGITS, K]."""
    row, column, local, inside = _matrix_tile(held, lead, count, ROWS, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.int64)
    for digit in tl.static_range(DIGITS):
        part = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
        for start in range(0, seeds_count, SEEDS):
            k = start + tl.arange(0, SEEDS)
            known = k < seeds_count
            factor = tl.load(digits + digit * seeds_count + k, mask=known, other=0)
            u = tl.load(
                row_signs + k[None, :].to(tl.int64) * rows + row[:, None],
                mask=known[None, :] & (row < rows)[:, None],
                other=0,
            )
            v = tl.load(
                column_signs + k[:, None].to(tl.int64) * held + column[None, :],
                mask=known[:, None] & (column < held)[None, :],
                other=0,
            )
            part = tl.dot(u * factor[None, :], v, part, out_dtype=tl.int32)
        total += part.to(tl.int64) << (digit * DIGIT_BITS)
    scale = factor_bits.to(tl.int64).to(tl.float64, bitcast=True)
    old = load_float(weight + local, inside).to(tl.float64)
    store_float(weight + local, (old + total.to(tl.float64) * scale).to(tl.float32), inside)


@triton.jit(do_not_specialize=["seeds_count"])
def project_kernel(
    delta,
    row_signs,
    column_signs,
    partials,
    seeds_count,
    rows: tl.int64,
    held: tl.int64,
    lead: tl.int64,
    count: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEEDS: tl.constexpr,
):
    """partials[tile, k] = sum over the tile of u_k[i] delta[i, j] v_k[j]; float64 [tiles, K]."""
    row, column, local, inside = _matrix_tile(held, lead, count, ROWS, COLUMNS)
    change = load_float(delta + local, inside)
    tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    for start in range(0, seeds_count, SEEDS):
        k = start + tl.arange(0, SEEDS)
        known = k < seeds_count
        v = tl.load(
            column_signs + k[None, :].to(tl.int64) * held + column[:, None],
            mask=known[None, :] & (column < held)[:, None],
            other=0,
        )
        u = tl.load(
            row_signs + k[None, :].to(tl.int64) * rows + row[:, None],
            mask=known[None, :] & (row < rows)[:, None],
            other=0,
        )
        # "ieee": float32 products; the tensor cores' own format would keep 11 bits of the change
        product = tl.dot(change, v.to(tl.float32), input_precision="ieee")  # [ROWS, SEEDS]
        sums = tl.sum(product.to(tl.float64) * u.to(tl.float64), axis=0)
        tl.store(partials + tile * seeds_count + k, sums, mask=known)


def noise_(out: torch.Tensor, seed: int, tensor_id: int, part: Part) -> None:
    """Write u v' at the elements of `part` into `out`: float32, contiguous."""
    held = matrix(part, out.numel(), out.device)
    _launch(noise_kernel, held, out, *_signs(held, seed_tensor([seed], out.device), tensor_id))


def perturb(
    out: torch.Tensor, weight: torch.Tensor, seed: int, step: float, tensor_id: int, part: Part
) -> None:
    """out = fma(u v', step, weight)."""
    held = matrix(part, weight.numel(), weight.device)
    signs = _signs(held, seed_tensor([seed], weight.device), tensor_id)
    _launch(perturb_kernel, held, as_pointer(out), as_pointer(weight), *signs, step)


def replay_(
    weight: torch.Tensor,
    seeds: Sequence[int],
    coefficients: torch.Tensor,
    factor: float,
    tensor_id: int,
    part: Part,
) -> None:
    """weight = round(weight + factor * sum_k coefficients[k] u_k v_k'), in place."""
    if len(seeds) >= MOST_SEEDS:
        raise ValueError(f"seeds must be fewer than {MOST_SEEDS}, and there are {len(seeds)}")
    held = matrix(part, weight.numel(), weight.device)
    signs = _signs(held, seed_tensor(seeds, weight.device), tensor_id)
    digits = balanced_digits(coefficients).to(weight.device)
    arguments = (as_pointer(weight), *signs, digits, len(seeds), float64_bits(factor))
    _launch(replay_kernel, held, *arguments, DIGITS=len(digits), SEEDS=SEEDS)


def project(delta: torch.Tensor, seeds: Sequence[int], tensor_id: int, part: Part) -> torch.Tensor:
    """Return u_k' delta v_k for every seed: float64 [K]."""
    held = matrix(part, delta.numel(), delta.device)

    def fill(some: torch.Tensor, partials: torch.Tensor) -> None:
        signs = _signs(held, some, tensor_id)
        _launch(
            project_kernel,
            held,
            as_pointer(delta),
            *signs,
            partials,
            len(some),
            SEEDS=PROJECTED_SEEDS,
        )

    return partial_sums(seeds, held.grid[0] * held.grid[1], delta.device, fill)


def balanced_digits(coefficients: torch.Tensor) -> torch.Tensor:
    """Return int32 [K] as digits d: int8 [DIGITS, K], coefficients = sum of d[i] * 128**i.

    As few digits as the largest needs; each is in -64 .. 64.
    """
    rest = coefficients.to("cpu", torch.int64)
    digits: list[torch.Tensor] = []
    while not digits or bool(rest.any()):
        digit = ((rest + 64) & 127) - 64
        digits.append(digit.to(torch.int8))
        rest = (rest - digit) >> DIGIT_BITS.value
    return torch.stack(digits)


def _signs(held: Matrix, seeds: torch.Tensor, tensor_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return u: int8 [K, rows] and v: int8 [K, columns] of the seeds."""
    streams = ((ROW_STREAM, held.rows), (COLUMN_STREAM, held.columns))
    u, v = (_stream(stream, indices, seeds, tensor_id) for stream, indices in streams)
    return u, v


def _stream(
    stream: int, indices: torch.Tensor, seeds: torch.Tensor, tensor_id: int
) -> torch.Tensor:
    count, tile = len(indices), 1024
    out = torch.empty(len(seeds), count, dtype=torch.int8, device=indices.device)
    grid = (len(seeds), triton.cdiv(count, tile))
    launch(
        signs_kernel,
        grid,
        out.device,
        out,
        seeds,
        indices,
        count,
        signed(tensor_id),
        stream,
        TILE=tile,
    )
    return out


def _launch(kernel: Any, held: Matrix, *arguments: Any, **constants: Any) -> None:
    tiles = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    sizes = (len(held.rows), *held.sizes)
    launch(kernel, held.grid, held.rows.device, *arguments, *sizes, **constants, **tiles)
