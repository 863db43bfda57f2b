"""Quantised matrices on a GPU: dequantised in registers, on the way to the tensor cores.

The layout is that of `quantized_tensor.py`: the matrix [out, in] flattened, codes of 4 bits two to a
byte (the first in the high bits) or int8, a scale and perhaps a minimum for each block of weights.
`dequantize` has the bits of the reference. A product with few rows reads the codes once and never
forms the matrix; with many rows every tile of it would be dequantised again for each tile of rows,
so the matrix is formed once, in the type of the input, for torch's own product.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fedkernels.gpu.launching import launch
from fedkernels.gpu.rounding import (
    as_operand,
    as_pointer,
    load_float,
    load_operand,
    store_float,
)
from fedkernels.quantized_tensor import FORMATS, QuantizedTensor

TILE = 1024
# Rows up to which a product dequantises on the way. A guess: not measured on any GPU yet.
FUSED_ROWS = 64
TYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _scaled(value, at, known, scheme, NESTED_BLOCK: tl.constexpr):
    """Return value * scale + minimum, each step rounded; `at`: the block that a weight is in."""
    scales, minimums, nested_scales, nested_code, nested_offset = scheme
    scale = tl.load(scales + at, mask=known, other=0)
    if nested_scales is not None:
        code = tl.load(nested_code + scale.to(tl.int32), mask=known, other=0)
        outer = tl.load(nested_scales + at // NESTED_BLOCK, mask=known, other=0)
        scale = code * outer + tl.load(nested_offset)
    value = value * scale.to(tl.float32)
    if minimums is not None:
        value = value + tl.load(minimums + at, mask=known, other=0).to(tl.float32)
    return value


@triton.jit
def dequantize_kernel(
    out,
    codes,
    table,
    scales,
    minimums,
    nested_scales,
    nested_code,
    nested_offset,
    count: tl.int64,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """out[i] = the value of weight i, rounded once to out's type; out: [count]."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    known = i < count
    if table is None:
        value = tl.load(codes + i, mask=known, other=0).to(tl.float32)
    else:
        byte = tl.load(codes + i // 2, mask=known, other=0).to(tl.int32)
        code = tl.where(i % 2 == 0, byte >> 4, byte & 15)
        value = tl.load(table + code, mask=known, other=0)
    scheme = (scales, minimums, nested_scales, nested_code, nested_offset)
    store_float(out + i, _scaled(value, i // BLOCK, known, scheme, NESTED_BLOCK), known)


@triton.jit
def _weight_tile(
    codes,
    table,
    scheme,
    first_row,
    first_column,
    out_features,
    in_features,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return weights [HEIGHT, WIDTH] in float32, zero beyond the matrix.

    in_features is even where codes have 4 bits: the two codes of a byte are in one row and block.
    BLOCK 0 means that a row is a block.
    """
    row = first_row + tl.arange(0, HEIGHT)
    if table is None:
        column = first_column + tl.arange(0, WIDTH)
        known = (row < out_features)[:, None] & (column < in_features)[None, :]
        index = row.to(tl.int64)[:, None] * in_features + column[None, :]
        value = tl.load(codes + index, mask=known, other=0).to(tl.float32)
        at = tl.broadcast_to(row[:, None], [HEIGHT, WIDTH]) if BLOCK == 0 else index // BLOCK
        value = _scaled(value, at, known, scheme, NESTED_BLOCK)
    else:
        column = first_column + 2 * tl.arange(0, WIDTH // 2)
        known = (row < out_features)[:, None] & (column < in_features)[None, :]
        index = row.to(tl.int64)[:, None] * in_features + column[None, :]
        byte = tl.load(codes + index // 2, mask=known, other=0).to(tl.int32)
        first = tl.load(table + (byte >> 4), mask=known, other=0)
        second = tl.load(table + (byte & 15), mask=known, other=0)
        at = index // BLOCK
        first = _scaled(first, at, known, scheme, NESTED_BLOCK)
        second = _scaled(second, at, known, scheme, NESTED_BLOCK)
        value = tl.reshape(tl.join(first, second), [HEIGHT, WIDTH])
    return value


@triton.jit
def product_kernel(
    out,
    x,
    bias,
    codes,
    table,
    scales,
    minimums,
    nested_scales,
    nested_code,
    nested_offset,
    rows,
    out_features,
    in_features,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
    COARSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out = x W' + bias, or BACKWARD x W; x: [rows, inner], out: [rows, columns]; sums in float32.

    Forward the inner features are W's columns, backward its rows. COARSE multiplies bfloat16.
    """
    inner = out_features if BACKWARD else in_features
    columns = in_features if BACKWARD else out_features
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    scheme = (scales, minimums, nested_scales, nested_code, nested_offset)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, inner, INNER):
        i = start + tl.arange(0, INNER)
        known = (row < rows)[:, None] & (i < inner)[None, :]
        left = load_operand(x + row.to(tl.int64)[:, None] * inner + i[None, :], known, COARSE)
        weight = _weight_tile(
            codes,
            table,
            scheme,
            start if BACKWARD else first_column,
            first_column if BACKWARD else start,
            out_features,
            in_features,
            BLOCK,
            NESTED_BLOCK,
            INNER if BACKWARD else COLUMNS,
            COLUMNS if BACKWARD else INNER,
        ).to(left.dtype)
        right = weight if BACKWARD else tl.trans(weight)
        total = tl.dot(left, right, total, input_precision="tf32x3")
    if bias is not None:
        known_columns = column < columns
        total = total + load_float(bias + column, known_columns)[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    store_float(out + row.to(tl.int64)[:, None] * columns + column[None, :], total, inside)


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix [out, in] in `dtype`, rounded once from float32."""
    stored = dtype if dtype in TYPES else torch.float32
    out = torch.empty(tensor.shape, dtype=stored, device=tensor.device)
    grid = (triton.cdiv(out.numel(), TILE),)
    arguments = (*_parts(tensor), out.numel())
    constants = {"BLOCK": tensor.block, "NESTED_BLOCK": tensor.nested_block, "TILE": TILE}
    launch(dequantize_kernel, grid, out.device, as_pointer(out), *arguments, **constants)
    return out.to(dtype)


def linear(x: torch.Tensor, tensor: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x Wᵀ + bias, [rows, out_features]; x: contiguous float32 or bfloat16 [rows, in]."""
    if _fused(x, tensor):
        return _product(x, tensor, bias, backward=False)
    return torch.nn.functional.linear(
        x, dequantize(tensor, x.dtype), None if bias is None else bias.to(x.dtype)
    )


def linear_backward(dy: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """Return dy W, [rows, in_features]; dy: contiguous float32 or bfloat16 [rows, out]."""
    if _fused(dy, tensor):
        return _product(dy, tensor, None, backward=True)
    return dy @ dequantize(tensor, dy.dtype)


def _fused(x: torch.Tensor, tensor: QuantizedTensor) -> bool:
    # Of two codes in a byte both must be in one row; and a row of 4-bit codes may not be a block.
    aligned = tensor.table is None or (tensor.shape[1] % 2 == 0 and tensor.block != tensor.shape[1])
    return len(x) <= FUSED_ROWS and aligned


def _product(
    x: torch.Tensor, tensor: QuantizedTensor, bias: torch.Tensor | None, backward: bool
) -> torch.Tensor:
    out_features, in_features = tensor.shape
    columns = in_features if backward else out_features
    out = torch.empty(len(x), columns, dtype=x.dtype, device=x.device)
    sizes = tile(len(x))
    grid = (triton.cdiv(len(x), sizes["ROWS"]), triton.cdiv(columns, sizes["COLUMNS"]))
    launch(
        product_kernel,
        grid,
        x.device,
        as_operand(out),
        as_operand(x),
        None if bias is None else as_operand(bias),
        *_parts(tensor),
        len(x),
        out_features,
        in_features,
        BLOCK=0 if tensor.block == in_features else tensor.block,
        NESTED_BLOCK=tensor.nested_block,
        BACKWARD=backward,
        COARSE=x.dtype == torch.bfloat16,
        **sizes,
    )
    return out


def tile(rows: int) -> dict[str, int]:
    """Return the sizes of a product's tile; for few rows the least that tensor cores take."""
    if rows <= 16:
        return {"ROWS": 16, "COLUMNS": 32, "INNER": 64}
    return {"ROWS": 64, "COLUMNS": 64, "INNER": 32}


@functools.cache
def _table(fmt: str, device: torch.device) -> torch.Tensor | None:
    """Return a format's table of codes on a device, copied there once."""
    table = FORMATS[fmt].table
    return None if table is None else table.to(device)


def _parts(tensor: QuantizedTensor) -> tuple[Any, ...]:
    """Return what kernels take for a quantised matrix, from `codes` to `nested_offset`."""
    return (
        tensor.codes,
        _table(tensor.fmt, tensor.device),
        tensor.scales,
        tensor.minimums,
        tensor.nested_scales,
        tensor.nested_code,
        tensor.nested_offset,
    )
