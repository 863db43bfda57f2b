"""What the Triton kernels take on a CUDA machine, beside what that machine can do at best.

Times are medians between CUDA events after a warm-up, the second-level cache cleared before each
call (`triton.testing.do_bench`). The ceilings, a copy and a bfloat16 matmul, are measured in the
same run, and so is what each kernel is compared with.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from triton.testing import do_bench

import fedkernels as fk
from fedkernels.gpu import probes, quantized, sign_adapter
from fedkernels.part import Part

SIZE = 8192  # of a square weight that no cache holds
LAYER = 2048  # of the linear layers
SEEDS = 64
SIGN_SEEDS = 1024


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy (read and written), and bfloat16 FLOP per second of a matmul."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Timing:
    """One kernel: seconds, what it moves or computes, and what it is compared with.

    Attributes:
        moved: bytes that it must at least read and write.
        operations: additions and multiplications; 0 where memory is the limit.
        references: seconds of other ways to do the same, by name.
    """

    name: str
    seconds: float
    moved: float
    operations: float
    references: dict[str, float]


def measure_ceilings() -> Ceilings:
    """Measure the copy of 1 GiB and a bfloat16 matmul of 8192 x 8192."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    left, right = torch.randn(2, SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    return Ceilings(
        bandwidth=2 * source.nbytes / seconds(lambda: target.copy_(source)),
        flops=2 * SIZE**3 / seconds(lambda: left @ right),
    )


def timings() -> Iterator[Timing]:
    """Measure every primitive."""
    yield from _probe_timings()
    yield from _sign_timings()
    for rows in (1, 8, 128, 512, 4096):
        yield from _quantized_timings(rows)


def seconds(call: Callable[[], object]) -> float:
    """Return the median time of a call in seconds."""
    return float(do_bench(call, return_mode="median")) * 1e-3


def _probe_timings() -> Iterator[Timing]:
    weight = torch.randn(SIZE, SIZE, device="cuda")
    part = Part((SIZE, SIZE))
    moved = 2.0 * weight.nbytes
    seeds = list(range(SEEDS))
    coefficients = torch.arange(1, SEEDS + 1, dtype=torch.int32)
    normal = seconds(lambda: weight.add_(torch.randn_like(weight), alpha=1e-3))
    for probe in fk.PROBES:
        name = f"{probe}, {SIZE} x {SIZE} float32"
        taken = seconds(partial(probes.perturb, weight, weight, 1, 1e-3, 2, probe, part))
        yield Timing(f"perturb {name}", taken, moved, 0.0, {"torch.randn": normal})
        replay = partial(probes.replay_, weight, seeds, coefficients, 1e-9, 2, probe, part)
        taken = seconds(replay)
        work = 2.0 * SEEDS * weight.numel()
        references = {"torch.randn": SEEDS * normal}
        yield Timing(f"replay {name}, K {SEEDS}", taken, moved, work, references)
        taken = seconds(partial(probes.project, weight, seeds, 2, probe, part))
        yield Timing(f"project {name}, K {SEEDS}", taken, moved / 2, work, references)


def _sign_timings() -> Iterator[Timing]:
    rows = 128
    left, right = sign_adapter.factors(range(SIGN_SEEDS), 2, LAYER, LAYER, torch.device("cuda"))
    x = torch.randn(rows, LAYER, device="cuda", dtype=torch.bfloat16)
    signs = torch.ones(LAYER, SIGN_SEEDS, device="cuda", dtype=torch.bfloat16)

    def adapter() -> torch.Tensor:
        inner = sign_adapter.product(x, right, SIGN_SEEDS, None, None, x.dtype, True)
        return sign_adapter.product(inner, left, LAYER, None, None, x.dtype, True)

    work = 4.0 * rows * LAYER * SIGN_SEEDS
    moved = float(left.nbytes + right.nbytes + 2 * x.nbytes)
    references = {"dense factors": seconds(lambda: (x @ signs) @ signs.T)}
    name = f"sign adapter, {LAYER} x {LAYER}, K {SIGN_SEEDS}, {rows} rows"
    yield Timing(name, seconds(adapter), moved, work, references)


def _quantized_timings(rows: int) -> Iterator[Timing]:
    weight = torch.randn(LAYER, LAYER)
    dense = weight.to("cuda", torch.bfloat16)
    x = torch.randn(rows, LAYER, device="cuda", dtype=torch.bfloat16)
    for fmt in ("nf4", "int4", "int8"):
        matrix = fk.quantize(weight, fmt).to("cuda")
        references = {"dense bf16": seconds(lambda: x @ dense.T)}
        if fmt == "nf4" and importlib.util.find_spec("bitsandbytes") is not None:
            references["bitsandbytes"] = _bitsandbytes(x, dense)
        work, moved = 2.0 * rows * LAYER * LAYER, float(matrix.nbytes + 2 * x.nbytes)
        calls = {
            "forward": partial(quantized.linear, x, matrix, None),
            "backward": partial(quantized.linear_backward, x, matrix),
        }
        for direction, call in calls.items():
            name = f"{fmt} linear {direction}, {LAYER} x {LAYER}, {rows} rows"
            yield Timing(name, seconds(call), moved, work, references)


def _bitsandbytes(x: torch.Tensor, dense: torch.Tensor) -> float:
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    packed, state = bitsandbytes.functional.quantize_4bit(dense, quant_type="nf4")
    return seconds(lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state))
