"""What this machine can do at best, measured: the floor under every kernel's time."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import fedkernels as fk
from simulations.benchmarks.kernels.timing import least_seconds


@dataclass(frozen=True)
class MachineFloor:
    """Bandwidths in GB/s (10^9 bytes, reads and writes both counted), matmul peaks in GFLOP/s."""

    processor: str
    threads: int
    backend: str
    copy_gb_per_s: float
    read_modify_write_gb_per_s: float
    fp32_matmul_gflop_per_s: float
    bf16_matmul_gflop_per_s: float


def measure(quick: bool = False) -> MachineFloor:
    """Measure copy, in-place change and square matmuls with torch's present number of threads.

    `quick` takes an eighth of the arithmetic: a rougher figure.
    """
    count = 2**26  # 256 MiB in fp32: more than the caches of a large server hold
    size = 1024 if quick else 2048
    source, target = torch.ones(count), torch.zeros(count)
    moved = 2 * source.nbytes / 1e9
    return MachineFloor(
        processor=processor_name(),
        threads=torch.get_num_threads(),
        backend=fk.backend(),
        copy_gb_per_s=moved / least_seconds(lambda: target.copy_(source)),
        read_modify_write_gb_per_s=moved / least_seconds(lambda: target.add_(1.0)),
        fp32_matmul_gflop_per_s=_matmul_gflop_per_s(size, torch.float32),
        bf16_matmul_gflop_per_s=_matmul_gflop_per_s(size, torch.bfloat16),
    )


def processor_name() -> str:
    """Return the processor's name where the system tells it, else its architecture."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _matmul_gflop_per_s(size: int, dtype: torch.dtype) -> float:
    left, right = torch.randn(2, size, size).to(dtype)
    product = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / 1e9 / least_seconds(lambda: torch.mm(left, right, out=product))
