"""The fused multiply-add of float32, which torch does not offer: a * b + c with one rounding."""

from __future__ import annotations

import torch


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return float32 a * b + c, rounded once, to nearest even; a, b, c are float32 and broadcast.

    The product of two float32 is exact in float64. Its sum with c is not, and rounding that sum to
    float32 would be a second rounding; so the sum is rounded to odd: its last bit is set where it
    is not exact, after which the second rounding cannot meet a false tie (Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    # the error of the sum, exactly (Knuth's two-sum)
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    inexact = torch.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    towards_error = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where(inexact, bits + towards_error, bits)
    return odd.view(torch.float64).float()
