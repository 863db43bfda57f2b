"""How the products with a quantised matrix are computed, on rows [rows, features] that were checked.

The reference computes in float64. The other backends do a few rows in one compiled pass over the
packed weights. For more rows they dequantise the matrix panel by panel, into memory that is used
again and again (fresh memory costs more than the dequantising, for the system clears it page by
page), and torch multiplies the panels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from fedkernels.backends import instruction_set, threads
from fedkernels.quantized_tensor import QuantizedTensor
from fedkernels.reference import quantized as reference

if TYPE_CHECKING:
    from fedkernels import _cpu

# The compiled pass over the packed weights serves at most this many rows: beyond, torch multiplies
# dequantised panels faster, in bfloat16 sooner than in float32.
FEW_ROWS = {torch.float32: 32, torch.bfloat16: 16}

# Elements of a panel: small beside the matrix of a large layer, large beside the cost of a call.
PANEL = 1 << 22

_compiled_matrices: WeakKeyDictionary[QuantizedTensor, _cpu.QuantizedMatrix] = WeakKeyDictionary()
_scratch = threading.local()


def quantize(weight: torch.Tensor, fmt: str) -> QuantizedTensor:
    """Return a contiguous float32 matrix in a format that `reference.quantize` knows."""
    isa = instruction_set()
    if isa is None or weight.device.type != "cpu":
        return reference.quantize(weight, fmt)
    from fedkernels import _cpu

    block = weight.shape[1] if fmt == "int8" else reference.BLOCK
    low = torch.empty(-(-weight.numel() // block))
    high = torch.empty_like(low)
    _cpu.block_ranges_(weight, block, low, high, isa, threads())
    absmax = torch.maximum(low.abs(), high.abs())
    shape = (weight.shape[0], weight.shape[1])
    if fmt == "int8":
        scales = absmax / 127
        codes = torch.empty(weight.numel(), dtype=torch.int8)
        inverse = reference.inverse(scales)
        _cpu.quantize_codes_(weight, block, inverse, None, None, codes, isa, threads())
        return QuantizedTensor(fmt, shape, block, codes, scales)
    codes = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8)
    if fmt == "int4":
        scales, minimums = reference.int4_steps(low, high)
        inverse = reference.inverse(scales)
        _cpu.quantize_codes_(weight, block, inverse, None, minimums.float(), codes, isa, threads())
        return QuantizedTensor(fmt, shape, block, codes, scales, minimums)
    borders = reference.borders(reference.nf4_table())
    inverse = reference.inverse(absmax)
    _cpu.quantize_codes_(weight, block, inverse, borders, None, codes, isa, threads())
    return reference.nf4_of_parts(codes, absmax, weight.shape)


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix in `dtype`."""
    if not _is_compiled(tensor):
        return reference.dequantize(tensor).to(dtype)
    direct = dtype in (torch.float32, torch.bfloat16)
    out = torch.empty(tensor.shape, dtype=dtype if direct else torch.float32)
    _dequantize_(out, tensor, 0, 0)
    return out if direct else out.to(dtype)


def linear(x: torch.Tensor, tensor: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x Wᵀ + bias, [rows, out_features]."""
    if instruction_set() is None:
        return reference.linear(x, tensor, bias)
    if x.shape[0] <= FEW_ROWS[x.dtype] and _is_compiled(tensor):
        return _few_rows(x, tensor, bias)
    y = x.new_empty(x.shape[0], tensor.shape[0])
    for first, past, panel in _row_panels(tensor, x.dtype):
        if bias is None:
            torch.mm(x, panel.T, out=y[:, first:past])
        else:
            torch.addmm(bias[first:past].to(x.dtype), x, panel.T, out=y[:, first:past])
    return y


def linear_backward(dy: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """Return dy W, [rows, in_features]."""
    if instruction_set() is None:
        return reference.linear_backward(dy, tensor)
    dx = dy.new_empty(dy.shape[0], tensor.shape[1])
    for first, past, panel in _column_panels(tensor, dy.dtype):
        torch.mm(dy, panel, out=dx[:, first:past])
    return dx


def lora_linear(
    x: torch.Tensor,
    tensor: QuantizedTensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (W + scale B A)ᵀ + bias, and x Aᵀ."""
    xa = x @ A.to(x.dtype).T
    if instruction_set() is None:
        return reference.lora_linear(x, tensor, A, B, scale, bias), xa
    y = linear(x, tensor, bias)
    return y.addmm_(xa, B.to(x.dtype).T, alpha=scale), xa


def lora_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    xa: torch.Tensor,
    tensor: QuantizedTensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    needed: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients to x, A and B, each where it is needed, else None."""
    if instruction_set() is None:
        return reference.lora_linear_backward(dy, x, tensor, A, B, scale)
    to_x, to_a, to_b = needed
    dx: torch.Tensor | None = None
    da: torch.Tensor | None = None
    db: torch.Tensor | None = None
    dyb = dy @ B.to(dy.dtype) if to_x or to_a else None
    if to_x and dyb is not None:
        dx = linear_backward(dy, tensor).addmm_(dyb, A.to(dy.dtype), alpha=scale)
    if to_a and dyb is not None:
        da = (dyb.T @ x).to(A.dtype).mul_(scale)
    if to_b:
        db = (dy.T @ xa).to(B.dtype).mul_(scale)
    return dx, da, db


def _few_rows(x: torch.Tensor, tensor: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    from fedkernels import _cpu

    y = x.new_empty(x.shape[0], tensor.shape[0])
    bias = None if bias is None else bias.float().contiguous()
    _cpu.quantized_few_rows_(y, x, _compiled(tensor), bias, _isa(), threads())
    return y


def _row_panels(
    tensor: QuantizedTensor, dtype: torch.dtype
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first, past, W[first:past]); a panel is valid until the next one."""
    rows, columns = tensor.shape
    at_once = max(PANEL // columns, 1)
    whole = None if _is_compiled(tensor) else reference.dequantize(tensor).to(dtype)
    for first in range(0, rows, at_once):
        past = min(first + at_once, rows)
        if whole is not None:
            yield first, past, whole[first:past]
        else:
            panel = _panel((past - first, columns), dtype)
            _dequantize_(panel, tensor, first, 0)
            yield first, past, panel


def _column_panels(
    tensor: QuantizedTensor, dtype: torch.dtype
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first, past, W[:, first:past]); a panel is valid until the next one.

    A product over columns is complete, while one over rows would be rounded once for each panel.
    """
    rows, columns = tensor.shape
    at_once = max(PANEL // rows // 64, 1) * 64
    whole = None if _is_compiled(tensor) else reference.dequantize(tensor).to(dtype)
    for first in range(0, columns, at_once):
        past = min(first + at_once, columns)
        if whole is not None:
            yield first, past, whole[:, first:past]
        else:
            panel = _panel((rows, past - first), dtype)
            _dequantize_(panel, tensor, 0, first)
            yield first, past, panel


def _panel(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return uninitialised memory that this thread uses for one panel at a time."""
    needed = shape[0] * shape[1] * dtype.itemsize
    memory: torch.Tensor | None = getattr(_scratch, "memory", None)
    if memory is None or memory.numel() < needed:
        memory = _scratch.memory = torch.empty(needed, dtype=torch.uint8)
    return memory[:needed].view(dtype).view(shape)


def _dequantize_(out: torch.Tensor, tensor: QuantizedTensor, row: int, column: int) -> None:
    """Write the part of the matrix that begins at (row, column) into `out`."""
    from fedkernels import _cpu

    _cpu.dequantize_(out, _compiled(tensor), row, column, _isa(), threads())


def _isa() -> int:
    isa = instruction_set()
    assert isa is not None
    return isa


def _is_compiled(tensor: QuantizedTensor) -> bool:
    return instruction_set() is not None and tensor.device.type == "cpu"


def _compiled(tensor: QuantizedTensor) -> _cpu.QuantizedMatrix:
    """Return the compiled kernels' view of the same memory, made once."""
    matrix = _compiled_matrices.get(tensor)
    if matrix is None:
        from fedkernels import _cpu

        matrix = _cpu.QuantizedMatrix(
            tensor.codes,
            tensor.scales,
            tensor.minimums,
            tensor.nested_scales,
            tensor.nested_code,
            tensor.nested_offset,
            tensor.table,
            *tensor.shape,
            tensor.block,
            tensor.nested_block,
        )
        _compiled_matrices[tensor] = matrix
    return matrix
