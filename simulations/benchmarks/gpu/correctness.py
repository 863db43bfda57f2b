"""Does every Triton kernel agree with the reference on the CPU, on this device?

Probes must have the same bits (projections agree within 1e-6 of the change's norm), products must
be those of the dequantised or unpacked matrices within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedkernels.checks import float32
from fedkernels.gpu import probes, quantized, sign_adapter
from fedkernels.part import Part
from fedkernels.probes import PROBES
from fedkernels.reference import quantized as quantized_reference
from fedkernels.reference import replay as replay_reference
from fedkernels.reference import sign_adapter as sign_reference
from fedkernels.reference.probes import UNITS

SEEDS = [2**64 - 1, 0, 0x0123456789ABCDEF]
COEFFICIENTS = [2**31 - 1, -(2**31), 12345]
TENSOR_ID = 2**40 + 7
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Check:
    """One comparison: `detail` says what was compared, and how far apart it was where not equal."""

    name: str
    passed: bool
    detail: str


def checks(device: torch.device, size: int) -> Iterator[Check]:
    """Compare every kernel on weights of about size * size elements."""
    whole = Part((size, size + 3))
    pruned = Part(whole.shape, rows=range(0, size, 3), columns=range(1, size, 2))
    parts = {
        "whole": (whole, whole.shape),
        "shard": (Part(whole.shape, offset=size + 5), (size, size)),
        "pruned": (pruned, (len(range(0, size, 3)), len(range(1, size, 2)))),
    }
    for probe in PROBES:
        for name, (part, shape) in parts.items():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                label = f"{probe}, {name}, {str(dtype).removeprefix('torch.')}"
                yield from _probe_checks(label, probe, part, shape, dtype, device)
    yield from _sign_checks(size, device)
    for fmt in ("nf4", "int4", "int8"):
        yield from _quantized_checks(fmt, size, device)


def _probe_checks(
    label: str,
    probe: str,
    part: Part,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Check]:
    weight = _values(*shape, dtype=dtype)
    where = (TENSOR_ID, probe, part.shape, part.elements(weight.numel()))
    step = float32(1e-3 * UNITS[probe])

    moved = weight.to(device, copy=True)
    probes.perturb(moved, moved, SEEDS[0], step, TENSOR_ID, probe, part)
    expected = replay_reference.perturbed(weight, SEEDS[0], step, *where)
    yield _same_bits(f"perturb {label}", moved, expected)

    moved, factor = weight.to(device, copy=True), math.ldexp(UNITS[probe], -34)
    integers = torch.tensor(COEFFICIENTS, dtype=torch.int32)
    probes.replay_(moved, SEEDS, integers, factor, TENSOR_ID, probe, part)
    expected = replay_reference.replayed(weight, SEEDS, COEFFICIENTS, factor, *where)
    yield _same_bits(f"replay {label}", moved, expected)

    measured = probes.project(weight.to(device), SEEDS, TENSOR_ID, probe, part).cpu()
    expected = replay_reference.projected(weight, SEEDS, *where)
    error = float((measured - expected).abs().max() / weight.double().norm())
    yield Check(f"project {label}", error <= 1e-6, f"error / norm {error:.1e}")


def _sign_checks(size: int, device: torch.device) -> Iterator[Check]:
    seeds = list(range(70))
    factors = sign_adapter.factors(seeds, TENSOR_ID, size, size + 3, device)
    expected = sign_reference.factors(seeds, TENSOR_ID, size, size + 3)
    for name, mine, theirs in zip(("U", "V"), factors, expected, strict=True):
        yield _same_bits(f"sign factors {name}", mine, theirs)
    turned = sign_adapter.transpose(factors[0])
    yield _same_bits("sign transpose", turned, sign_reference.transpose(expected[0]))
    signs = sign_reference.signs(expected[1], size + 3, len(seeds)).double()
    for dtype, tolerance in TOLERANCE.items():
        x = _values(9, size + 3, dtype=dtype)
        coarse = dtype == torch.bfloat16
        arguments = (x.to(device), factors[1], len(seeds), None, None, dtype, coarse)
        measured = sign_adapter.product(*arguments)
        yield _near(f"sign product {dtype}", measured, x.double() @ signs, tolerance)


def _quantized_checks(fmt: str, size: int, device: torch.device) -> Iterator[Check]:
    matrix = quantized_reference.quantize(_values(size, size + 4), fmt)
    moved = matrix.to(device)
    dense = quantized_reference.dequantize(matrix)
    for dtype in TOLERANCE:
        mine = quantized.dequantize(moved, dtype)
        yield _same_bits(f"dequantize {fmt} {dtype}", mine, dense.to(dtype))
    for dtype, tolerance in TOLERANCE.items():
        for rows in (1, 33, 100):
            x, dy = _values(rows, size + 4, dtype=dtype), _values(rows, size, dtype=dtype)
            y = quantized.linear(x.to(device), moved, None)
            dx = quantized.linear_backward(dy.to(device), moved)
            name = f"linear {fmt}, {rows} rows, {dtype}"
            yield _near(name, y, x.double() @ dense.double().T, tolerance)
            yield _near(f"{name}, backward", dx, dy.double() @ dense.double(), tolerance)


def _values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def _same_bits(name: str, mine: torch.Tensor, theirs: torch.Tensor) -> Check:
    bits = [t.cpu().contiguous().view(torch.uint8) for t in (mine, theirs)]
    different = int((bits[0] != bits[1]).sum())
    return Check(
        name, different == 0, "same bits" if not different else f"{different} bytes differ"
    )


def _near(name: str, mine: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> Check:
    error = float((mine.cpu().double() - theirs).norm() / theirs.norm())
    return Check(name, error <= tolerance, f"relative error {error:.1e}")
