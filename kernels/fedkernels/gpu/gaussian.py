"""Normal values from words, operation by operation those of `reference/gaussian.py`.

Each operation rounds once, which `launching.py` sees to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedkernels.gpu.rounding import fused_multiply_add
from fedkernels.reference import gaussian as reference

LOG = tl.constexpr(reference.LOG)
COS = tl.constexpr(reference.COS)
SIN = tl.constexpr(reference.SIN)
MINUS_2_LN_2 = tl.constexpr(reference.MINUS_2_LN_2)
SQRT_HALF_BITS = tl.constexpr(reference.SQRT_HALF_BITS)
LOG_DEGREE = tl.constexpr(len(reference.LOG) - 1)
COS_DEGREE = tl.constexpr(len(reference.COS) - 1)
SIN_DEGREE = tl.constexpr(len(reference.SIN) - 1)


@triton.jit
def gaussian_pair(first, second):
    """Return two float32 tensors of normal values from two uint32 tensors of words."""
    radius = tl.sqrt_rn(_minus_2_log(first))
    x = _signed_angle(second).to(tl.float32) * 2.0**-25
    square = x * x
    cosine = _polynomial(square, COS, COS_DEGREE) * (1 - 2 * (second >> 31).to(tl.int32)).to(
        tl.float32
    )
    sine = x * _polynomial(square, SIN, SIN_DEGREE)
    swap = ((second >> 30) & 1) != 0
    return radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def _minus_2_log(word):
    """Return float32 -2 ln(u), u = (word >> 1 | 1) / 2**31."""
    numerator = ((word >> 1) | 1).to(tl.int32)
    bits = numerator.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    fraction = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    constant = (exponent - 31).to(tl.float32) * MINUS_2_LN_2
    return fused_multiply_add(fraction, _polynomial(fraction, LOG, LOG_DEGREE), constant)


@triton.jit
def _signed_angle(word):
    """Return bits 5 to 29 of the word as a signed odd integer in (-2**24, 2**24)."""
    low = ((word >> 5) & 0x1FFFFFF).to(tl.int32)
    return (low - ((low >> 24) << 25)) | 1


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """Return the polynomial with these coefficients (lowest power first) by Horner's rule."""
    value = tl.full(x.shape, COEFFICIENTS[DEGREE], tl.float32)
    for step in tl.static_range(DEGREE):
        constant = tl.full(x.shape, COEFFICIENTS[DEGREE - 1 - step], tl.float32)
        value = fused_multiply_add(value, x, constant)
    return value
