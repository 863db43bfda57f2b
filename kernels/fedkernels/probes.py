"""Probes: random directions in weight space that a seed names, so that they are never sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedkernels.backends import instruction_set, threads, uses_triton
from fedkernels.checks import device_of, float32, sizes, whole_number
from fedkernels.part import Part
from fedkernels.reference import replay as reference
from fedkernels.reference.probes import MASK, UNITS, philox4x32

PROBES = tuple(UNITS)

# No tensor has this id, so the stream of derived seeds never meets the stream of a probe.
SEED_STREAM = (0xFFFFFFFF, 0xFFFFFFFF)


def noise(
    seed: int,
    tensor_id: int,
    shape: Sequence[int],
    probe: str = "rademacher",
    part: Part | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the probe of one tensor: float32 of `shape`, mean zero, unit variance.

    The value of an element depends on the seed, the tensor id and the element's row-major index
    alone (rank1: its row and column). Hence the probe of the first rows of a matrix is the first
    rows of its probe. `fedkernels.reference.probes` defines the values.

    Args:
        seed: in [0, 2**64).
        tensor_id: position of the tensor in its layout, in [0, 2**64 - 1).
        shape: sizes of the result; () is a scalar.
        probe: one of `PROBES`.
        part: what the result holds of a larger tensor; None: `shape` is the whole.
        device: where the result is.

    Raises:
        ValueError: an argument is out of its range, or the probe is unknown.
    """
    seed = checked_seed(seed)
    tensor_id = checked_tensor(tensor_id, probe)
    shape = sizes("shape", shape)
    part = part_of(shape, part, "shape")
    device = device_of(device)
    if not uses_triton(device) and device.type != "cpu":
        return noise(seed, tensor_id, shape, probe, part).to(device)
    values = torch.zeros(shape, dtype=torch.float32, device=device)
    if values.numel() == 0:
        return values
    if uses_triton(values.device):
        from fedkernels.gpu import probes as gpu

        gpu.noise_(values, seed, tensor_id, probe, part)
        return values
    step = float32(UNITS[probe])
    isa = instruction_set()
    if isa is None:
        elements = part.elements(values.numel())
        return reference.perturbed(values, seed, step, tensor_id, probe, part.shape, elements)
    from fedkernels import _cpu

    _cpu.perturb(
        values, None, *part.pieces(values.numel()), part.width, seed, tensor_id,
        kernel_probe(probe, part), step, isa, threads(),
    )  # fmt: skip
    return values


def derive_seed(master_seed: int, index: int) -> int:
    """Return the seed of probe `index` in the pool of `master_seed`: an integer in [0, 2**63).

    It is one block of Philox4x32-10 in a stream of its own, so seeds of one pool are unrelated.

    Raises:
        ValueError: `master_seed` or `index` is outside [0, 2**64).
    """
    master_seed = whole_number("master_seed", master_seed, 0, 2**64)
    index = whole_number("index", index, 0, 2**64)
    counter = (index & MASK, index >> 32, *SEED_STREAM)
    low, high, _, _ = philox4x32(counter, (master_seed & MASK, master_seed >> 32))
    return (high << 32 | low) & (2**63 - 1)


def checked_seed(seed: int) -> int:
    """Return the seed as a Python integer; ValueError unless it is in [0, 2**64)."""
    return whole_number("seed", seed, 0, 2**64)


def checked_tensor(tensor_id: int, probe: str) -> int:
    """Return the id as a Python integer; ValueError unless this probe of this tensor exists."""
    if probe not in PROBES:
        raise ValueError(f"unknown probe {probe!r}; available: {', '.join(PROBES)}")
    return whole_number("tensor_id", tensor_id, 0, 2**64 - 1)


def part_of(shape: tuple[int, ...], part: Part | None, name: str) -> Part:
    """Return `part`, or the whole of `shape`; ValueError if `name` of this shape cannot hold it."""
    if part is None:
        return Part(shape)
    if not isinstance(part, Part):
        raise ValueError(f"part must be a Part, not {type(part).__name__}")
    part.check_holds(name, shape)
    return part


def kernel_probe(probe: str, part: Part) -> int:
    """Return the number that compiled kernels know a probe by (cpu/probes.h)."""
    return PROBES.index("rademacher" if probe == "rank1" and len(part.shape) < 2 else probe)
