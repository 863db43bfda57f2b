"""Sums over seeds: their types, and partial sums that are added up in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton.language as tl

from fedkernels.gpu.placement import signed

# Partial sums of a projection, float64: at most 64 MiB of them at once.
PARTIALS = 1 << 23


def sum_type(coefficients: torch.Tensor, largest: int) -> tl.dtype:
    """Return the integer type that holds every sum of coefficients times -largest .. largest."""
    bound = int(coefficients.to(torch.int64).abs().sum()) * largest
    return tl.int32 if bound < 2**31 else tl.int64


def partial_sums(
    seeds: Sequence[int],
    tiles: int,
    device: torch.device,
    fill: Callable[[torch.Tensor, torch.Tensor], None],
) -> torch.Tensor:
    """Return a sum for each seed, float64 [K], of what `fill` writes for its tiles.

    `fill(some, partials)` is called with some of the seeds (int64 tensor) and writes partials:
    float64 [tiles, len(some)].
    """
    result = torch.zeros(len(seeds), dtype=torch.float64, device=device)
    at_once = max(1, PARTIALS // max(1, tiles))
    for start in range(0, len(seeds) if tiles else 0, at_once):
        some = seed_tensor(seeds[start : start + at_once], device)
        partials = torch.empty(tiles, len(some), dtype=torch.float64, device=device)
        fill(some, partials)
        result[start : start + at_once] = partials.sum(dim=0)
    return result


def seed_tensor(seeds: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return seeds in [0, 2**64) as the int64 tensor with their bits."""
    return torch.tensor([signed(seed) for seed in seeds], dtype=torch.int64).to(device)


def float64_bits(value: float) -> int:
    """Return the bits of a float64, as a signed integer."""
    return int(torch.tensor(value, dtype=torch.float64).view(torch.int64))
