"""Move weights along probes, and measure a change along them, without ever storing a probe.

`perturb_` and `perturbed` take one step along one probe, `replay_` takes the steps of many at once
and rounds once, `project` returns the coordinates of a change. Weights are float32, bfloat16 or
float16, and may be a `Part` of a larger tensor. `fedkernels.reference.replay` defines the results;
all backends, thread counts and parts give the same bits for perturb and replay.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch.autograd.graph import increment_version

from fedkernels.backends import instruction_set, threads, uses_triton
from fedkernels.checks import dense_tensor, finite_float32, float32, whole_number, whole_numbers
from fedkernels.part import Part
from fedkernels.probes import checked_seed, checked_tensor, kernel_probe, part_of
from fedkernels.reference import replay as reference
from fedkernels.reference.probes import UNITS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Powers of two beyond these would leave float64 with int32 coefficients, or are mistakes.
LARGEST_EXPONENT = 512

Integers = Sequence[int] | torch.Tensor


def perturb_(
    weight: torch.Tensor,
    seed: int,
    scale: float,
    tensor_id: int,
    probe: str = "rademacher",
    part: Part | None = None,
) -> torch.Tensor:
    """Add scale * z to the weight in place, in one pass, and return it.

    The sum is one fused multiply-add in float32, and one more rounding for narrower weights. It is
    not undone by -scale: where a weight must come back exactly, use `perturbed`.

    Args:
        weight: contiguous float32, bfloat16 or float16 tensor, on the CPU or on a GPU with Triton.
        scale: finite.
        seed, tensor_id, probe, part: as for `noise`.

    Raises:
        ValueError: an argument is outside its range, or the weight cannot hold the part.
    """
    return perturbed(weight, seed, scale, tensor_id, probe, out=weight, part=part)


def perturbed(
    weight: torch.Tensor,
    seed: int,
    scale: float,
    tensor_id: int,
    probe: str = "rademacher",
    out: torch.Tensor | None = None,
    part: Part | None = None,
) -> torch.Tensor:
    """Return weight + scale * z, leaving the weight as it is; one pass from weight to `out`.

    `out` is scratch of the weight's dtype and shape (None: a new tensor), so that a model is
    perturbed layer by layer in the memory of its largest layer, and there is nothing to restore.
    Arguments and errors are those of `perturb_`.
    """
    seed, tensor_id = checked_seed(seed), checked_tensor(tensor_id, probe)
    source = _checked("weight", weight)
    step = float32(finite_float32("scale", scale) * UNITS[probe])
    result = torch.empty_like(weight) if out is None else out
    target = _checked("out", result)
    if target.device != source.device:
        raise ValueError(f"out is on {target.device}, and weight is on {source.device}")
    if target.dtype != source.dtype or target.shape != source.shape:
        raise ValueError(
            f"out is {target.dtype} {list(target.shape)}, and weight is {source.dtype} "
            f"{list(source.shape)}"
        )
    if target.data_ptr() != source.data_ptr() and _overlap(target, source):
        raise ValueError("out overlaps weight; it must be the weight itself or memory of its own")
    part = part_of(tuple(source.shape), part, "weight")
    if uses_triton(source.device):
        from fedkernels.gpu import probes as gpu

        gpu.perturb(target, source, seed, step, tensor_id, probe, part)
        _written(result)
        return result
    isa = instruction_set()
    if isa is None:
        elements = part.elements(source.numel())
        target.copy_(
            reference.perturbed(source, seed, step, tensor_id, probe, part.shape, elements)
        )
        return result
    from fedkernels import _cpu

    _cpu.perturb(
        target, source, *part.pieces(source.numel()), part.width, seed, tensor_id,
        kernel_probe(probe, part), step, isa, threads(),
    )  # fmt: skip
    _written(result)
    return result


def replay_(
    weight: torch.Tensor,
    seeds: Integers,
    coefficients: Integers,
    exponent: int,
    tensor_id: int,
    probe: str = "rademacher",
    part: Part | None = None,
) -> torch.Tensor:
    """Set weight to round(weight + 2**exponent * sum_k coefficients[k] z_k), and return it.

    The weight is read and written once, whatever the number of seeds. For probes of integers the sum
    is an exact integer, so the result does not depend on the order of the seeds; for "gaussian" it
    is a float64 sum in their order.

    Args:
        weight: contiguous float32, bfloat16 or float16 tensor, on the CPU or on a GPU with Triton.
        seeds: K >= 1 integers in [0, 2**64).
        coefficients: K integers in [-2**31, 2**31).
        exponent: in [-512, 512].
        tensor_id, probe, part: as for `noise`.

    Raises:
        ValueError: an argument is outside its range, or the weight cannot hold the part.
    """
    tensor_id = checked_tensor(tensor_id, probe)
    target = _checked("weight", weight)
    seed_list = whole_numbers("seeds", seeds, 0, 2**64)
    coefficient_list = whole_numbers("coefficients", coefficients, -(2**31), 2**31)
    if len(coefficient_list) != len(seed_list):
        raise ValueError(
            f"{len(seed_list)} seeds need as many coefficients, not {len(coefficient_list)}"
        )
    exponent = whole_number("exponent", exponent, -LARGEST_EXPONENT, LARGEST_EXPONENT + 1)
    factor = 2.0**exponent * UNITS[probe]
    part = part_of(tuple(target.shape), part, "weight")
    if uses_triton(target.device):
        from fedkernels.gpu import probes as gpu

        integers = torch.tensor(coefficient_list, dtype=torch.int32)
        gpu.replay_(target, seed_list, integers, factor, tensor_id, probe, part)
        _written(weight)
        return weight
    isa = instruction_set()
    if isa is None:
        elements = part.elements(target.numel())
        target.copy_(
            reference.replayed(
                target, seed_list, coefficient_list, factor, tensor_id, probe, part.shape, elements
            )
        )
        return weight
    from fedkernels import _cpu

    _cpu.replay(
        target, *part.pieces(target.numel()), part.width, _words(seed_list),
        torch.tensor(coefficient_list, dtype=torch.int32), factor, tensor_id,
        kernel_probe(probe, part), isa, threads(),
    )  # fmt: skip
    _written(weight)
    return weight


def project(
    delta: torch.Tensor,
    seeds: Integers,
    tensor_id: int,
    probe: str = "rademacher",
    part: Part | None = None,
) -> torch.Tensor:
    """Return the inner products <delta, z_k>: float64 [K].

    They agree between backends within 1e-6 of their norm, and do not depend on the thread count.

    Args:
        delta: contiguous float32, bfloat16 or float16 tensor, on the CPU or on a GPU with Triton.
        seeds: K >= 1 integers in [0, 2**64).
        tensor_id, probe, part: as for `noise`.

    Raises:
        ValueError: an argument is outside its range, or delta cannot hold the part.
    """
    tensor_id = checked_tensor(tensor_id, probe)
    source = _checked("delta", delta)
    seed_list = whole_numbers("seeds", seeds, 0, 2**64)
    part = part_of(tuple(source.shape), part, "delta")
    if uses_triton(source.device):
        from fedkernels.gpu import probes as gpu

        return gpu.project(source, seed_list, tensor_id, probe, part)
    isa = instruction_set()
    if isa is None:
        elements = part.elements(source.numel())
        return reference.projected(source, seed_list, tensor_id, probe, part.shape, elements)
    from fedkernels import _cpu

    result = torch.empty(len(seed_list), dtype=torch.float64)
    _cpu.project(
        result, source, *part.pieces(source.numel()), part.width, _words(seed_list), tensor_id,
        kernel_probe(probe, part), isa, threads(),
    )  # fmt: skip
    return result.mul_(UNITS[probe])


def _checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor without its graph; ValueError unless a kernel can work on it."""
    dense_tensor(name, tensor)
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, not {tensor.dtype}")
    if tensor.device.type != "cpu" and not (tensor.is_cuda and uses_triton(tensor.device)):
        raise ValueError(f"{name} must be on the CPU, or a GPU with Triton, not on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, and its shape is {list(tensor.shape)}")
    return tensor.detach()


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    start, end = one.data_ptr(), one.data_ptr() + one.nbytes
    return start < other.data_ptr() + other.nbytes and other.data_ptr() < end


def _written(tensor: torch.Tensor) -> None:
    """Tell autograd, as torch's own in-place operations do, so that no backward uses a stale value."""
    if not tensor.is_inference():
        increment_version(tensor)


def _words(seeds: list[int]) -> torch.Tensor:
    """Return int64 [K] with the bits of the seeds."""
    return torch.frombuffer(array("Q", seeds), dtype=torch.int64)
