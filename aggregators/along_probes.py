"""Sums along many probes in one pass of the kernels, as exact as a float64 sum of single probes.

``fk.replay_`` reads a tensor once for all seeds, but takes int32 coefficients and rounds to float32.
Coefficients in two parts of 29 bits each, and a second pass for what rounding to float32 left, give
the sum to some 1e-14 of its largest term, at the price of three passes instead of one a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import fedkernels as fk

BITS = 29
# Powers of two whose inverses, and whose products with what stands beside them, are finite.
SMALLEST, LARGEST = -900, 1023


def probe_sum(
    shape: Sequence[int], seeds: Sequence[int], coefficients: Tensor, tensor_id: int, probe: str
) -> Tensor:
    """sum_k coefficients[k] z(seeds[k]) as a float64 tensor of ``shape``; coefficients: float64 [K]."""
    largest = float(coefficients.abs().max()) if len(coefficients) else 0.0
    if largest == 0.0:
        return torch.zeros(tuple(shape), dtype=torch.float64)
    # In units of a power of two: exact, and far from the ends of float32 whatever the numbers are.
    unit = _unit(largest)
    scaled = coefficients.double() / unit * 2.0**BITS
    coarse = scaled.round()
    fine = ((scaled - coarse) * 2.0**BITS).round()
    first = torch.zeros(tuple(shape), dtype=torch.float32)
    fk.replay_(first, seeds, coarse.long(), -BITS, tensor_id, probe)
    left = first.neg()
    fk.replay_(left, seeds, coarse.long(), -BITS, tensor_id, probe)
    total = first.double() + left
    if bool(fine.any()):
        smallest = torch.zeros(tuple(shape), dtype=torch.float32)
        total += fk.replay_(smallest, seeds, fine.long(), -2 * BITS, tensor_id, probe)
    return total * unit


def probe_products(delta: Tensor, seeds: Sequence[int], tensor_id: int, probe: str) -> Tensor:
    """<delta, z(seeds[k])> for each seed: float64 [K], within 1e-6 of their norm.

    Float64 is rounded to float32 in units of its largest value. ValueError for NaN and infinity.
    """
    if not bool(torch.isfinite(delta).all()):
        raise ValueError("a change must be finite")
    if delta.dtype != torch.float64:
        return fk.project(delta.contiguous(), seeds, tensor_id, probe)
    unit = _unit(float(delta.abs().max()))
    return fk.project((delta / unit).float().contiguous(), seeds, tensor_id, probe) * unit


def rank1_sides(
    shape: Sequence[int], seeds: Sequence[int], tensor_id: int
) -> tuple[Tensor, Tensor]:
    """U [m, K] and V [n, K] in float64 of a matrix's rank-1 probes: z(seeds[k]) = U[:, k] V[:, k]^T.

    A rank-1 probe of one column is u times v's first sign, and of one row v times u's first: K (m + n)
    signs are made, and no matrix.
    """
    rows, columns = shape
    left, right = torch.zeros(rows, len(seeds)), torch.zeros(columns, len(seeds))
    for k, seed in enumerate(seeds):
        corner = fk.noise(seed, tensor_id, (1, 1), "rank1")[0, 0]
        left[:, k] = fk.noise(seed, tensor_id, (rows, 1), "rank1")[:, 0] * corner
        right[:, k] = fk.noise(seed, tensor_id, (1, columns), "rank1")[0]
    return left.double(), right.double()


def _unit(largest: float) -> float:
    """A power of two near ``largest``."""
    return 2.0 ** min(max(math.frexp(largest)[1], SMALLEST), LARGEST)
