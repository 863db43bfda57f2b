"""Probes: random directions in weight space that a seed names, so that they are never sent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedkernels.backends import instruction_set
from fedkernels.reference import probes as reference
from fedkernels.reference.probes import MASK, philox4x32

PROBES = ("rademacher",)

# No tensor has this id, so the stream of derived seeds never meets the stream of a probe.
SEED_STREAM = (0xFFFFFFFF, 0xFFFFFFFF)


def noise(
    seed: int, tensor_id: int, shape: Sequence[int], probe: str = "rademacher"
) -> torch.Tensor:
    """Return the probe of one tensor: float32 of `shape`, mean zero, unit variance.

    The value of an element depends on the seed, the tensor id and the element's row-major index
    alone. Hence the probe of the first rows of a matrix is the first rows of its probe.

    Args:
        seed: in [0, 2**64).
        tensor_id: position of the tensor in its layout, in [0, 2**64 - 1).
        shape: sizes of the tensor; () is a scalar.
        probe: one of `PROBES`.

    Raises:
        ValueError: an argument is out of its range, or the probe is unknown.
    """
    if probe not in PROBES:
        raise ValueError(f"unknown probe {probe!r}; available: {', '.join(PROBES)}")
    _check_range("seed", seed, 2**64)
    _check_range("tensor_id", tensor_id, 2**64 - 1)
    sizes = tuple(shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"a shape has no negative sizes, and this one is {sizes}")
    return _rademacher(seed, tensor_id, math.prod(sizes)).reshape(sizes)


def derive_seed(master_seed: int, index: int) -> int:
    """Return the seed of probe `index` in the pool of `master_seed`: an integer in [0, 2**63).

    It is one block of Philox4x32-10 in a stream of its own, so seeds of one pool are unrelated.

    Raises:
        ValueError: `master_seed` or `index` is outside [0, 2**64).
    """
    _check_range("master_seed", master_seed, 2**64)
    _check_range("index", index, 2**64)
    counter = (index & MASK, index >> 32, *SEED_STREAM)
    low, high, _, _ = philox4x32(counter, (master_seed & MASK, master_seed >> 32))
    return (high << 32 | low) & (2**63 - 1)


def _rademacher(seed: int, tensor_id: int, count: int) -> torch.Tensor:
    if instruction_set() is None:
        return reference.rademacher(seed, tensor_id, count)
    from fedkernels import _cpu

    values = torch.empty(count, dtype=torch.float32)
    _cpu.rademacher_(values, seed, tensor_id, 0)
    return values


def _check_range(name: str, value: int, end: int) -> None:
    if not 0 <= value < end:
        raise ValueError(f"{name} must be in [0, {end}), and it is {value}")
