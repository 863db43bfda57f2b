"""Roundings that a law fixes, written so that hardware and interpreter give the same bits.

A bfloat16 tensor is passed to a kernel as the int16 view of its bits, and widened and narrowed with
integers: Triton's interpreter truncates where hardware rounds to nearest even. The interpreter also
rounds twice in `tl.fma`; there the fused result is computed in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def as_pointer(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a kernel is given for `tensor`: bfloat16 as the int16 view of its bits."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@triton.jit
def load_float(pointers, mask):
    """Load float32, float16 or bfloat16 (int16 pointers) as float32; zero outside the mask."""
    loaded = tl.load(pointers, mask=mask, other=0)
    if loaded.dtype == tl.int16:
        return (loaded.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return loaded.to(tl.float32)


@triton.jit
def store_float(pointers, value, mask):
    """Store float32 values, rounded once to nearest even where the tensor is narrower."""
    if pointers.dtype.element_ty == tl.int16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding could carry the mantissa of a NaN into an infinity: keep it a quiet NaN.
        narrow = tl.where(value != value, (bits >> 16) | 0x40, rounded)
        tl.store(pointers, narrow.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def fused_multiply_add(x, y, z):
    """Return x * y + z in float32 with one rounding."""
    if INTERPRETED:
        # The product is exact in float64. The sum is rounded to odd (its last bit is set if it is
        # inexact), after which rounding to float32 gives what a single rounding gives (Boldo and
        # Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
        # to odd", IEEE Transactions on Computers 57(4), 2008).
        product = x.to(tl.float64) * y.to(tl.float64)
        addend = z.to(tl.float64)
        total = product + addend
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        bits = total.to(tl.int64, bitcast=True)
        inexact = (error < 0) | (error > 0)  # and not NaN, which infinities make of it
        # Towards zero first, where the error has the other sign, then the sticky bit.
        opposite = inexact & ((error < 0) != (total < 0))
        odd = tl.where(inexact, (bits - opposite.to(tl.int64)) | 1, bits)
        return odd.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(x, y, z)


def as_operand(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a kernel with a matrix product is given: only interpreted, bfloat16 as bits."""
    return as_pointer(tensor) if INTERPRETED.value else tensor


@triton.jit
def load_operand(pointers, mask, COARSE: tl.constexpr):
    """Load a tile for `tl.dot`, zero outside the mask: as bfloat16 where COARSE, else float32.

    The interpreter multiplies no bfloat16: there the tile has its values in float32.
    """
    tile = load_float(pointers, mask)
    if COARSE and not INTERPRETED:
        tile = tile.to(tl.bfloat16)
    return tile
