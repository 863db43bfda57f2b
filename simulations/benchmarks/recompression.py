"""How fast, how lean and how exact recompression is: python -m simulations.benchmarks.recompression

The server adds the factors that its nodes sent and compresses the stack to a limited rank. This
compares `fedkernels.stack_svd` with what it replaces, the SVD of the dense sum. Every method runs
in a fresh process, so that one's memory is not in another's figure.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch
from rich.table import Table

import fedkernels as fk
from fedclient.memory import PeakMemory
from simulations.benchmarks.tables import table_console

# The ranks of FLoRA's ten unlike clients.
REFERENCE_RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)

Factors = list[tuple[torch.Tensor, torch.Tensor, float]]
Decomposition = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One square weight, the ranks that nodes sent for it, and the rank to compress them to."""

    size: int = 4096
    ranks: tuple[int, ...] = REFERENCE_RANKS
    rank: int = 64
    seed: int = 0

    @property
    def stack_bytes(self) -> int:
        """Bytes of all factors in float32: the unit of the memory figures."""
        return 2 * self.size * sum(self.ranks) * 4


@dataclass(frozen=True)
class Measurement:
    """What one method did; `extra_bytes` is None where the system does not tell."""

    method: str
    seconds: float
    extra_bytes: int | None
    error: float
    optimum: float


def draw(case: Case) -> Factors:
    """Return one (B, A, scale) per node; B and A like those of trained adapters in size."""
    generator = torch.Generator().manual_seed(case.seed)
    return [
        (
            0.01 * torch.randn(case.size, rank, generator=generator),
            torch.randn(rank, case.size, generator=generator) / case.size**0.5,
            16.0 / rank / len(case.ranks),
        )
        for rank in case.ranks
    ]


def dense_svd(factors: Factors, rank: int, dtype: torch.dtype) -> Decomposition:
    """Form the sum, decompose it whole, and cut: what stack_svd replaces."""
    total = torch.zeros(factors[0][0].shape[0], factors[0][1].shape[1], dtype=dtype)
    for b, a, scale in factors:
        total.addmm_(b.to(dtype), a.to(dtype), alpha=scale)
    u, sigma, vt = torch.linalg.svd(total, full_matrices=False)
    return u[:, :rank], sigma[:rank], vt[:rank]


def measure(case: Case, method: str, repeats: int, threads: int) -> Measurement:
    """Run one method on a case; meant for a process of its own."""
    torch.set_num_threads(threads)
    run = _runner(method)
    # loads the code of the linear algebra libraries and makes the workspaces of their threads
    run(draw(replace(case, size=min(case.size, 512))), case.rank)
    factors = draw(case)
    memory = PeakMemory(collect=True)
    started = time.perf_counter()
    result = run(factors, case.rank)
    times = [time.perf_counter() - started]
    extra = memory.read().grown
    for _ in range(repeats - 1):
        started = time.perf_counter()
        run(factors, case.rank)
        times.append(time.perf_counter() - started)
    sigma = fk.stack_svd(factors, method="qr")[1]
    optimum = float(sigma[case.rank :].norm())
    return Measurement(method, statistics.median(times), extra, distance(factors, result), optimum)


def distance(factors: Factors, result: Decomposition) -> float:
    """Return the Frobenius norm of sum - U sigma Vt in float64, some rows at a time."""
    u, sigma, vt = (part.double() for part in result)
    squared = torch.zeros((), dtype=torch.float64)
    for start in range(0, u.shape[0], 256):
        rows = slice(start, start + 256)
        block = -(u[rows] * sigma) @ vt
        for b, a, scale in factors:
            block.addmm_(b[rows].double(), a.double(), alpha=scale)
        squared += block.square().sum()
    return float(squared.sqrt())


def compare(
    case: Case, methods: Sequence[str], repeats: int = 7, threads: int = 1
) -> list[Measurement]:
    """Measure the methods one after another, each in a fresh process."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return [
            pool.submit(measure, case, method, 1 if method in _DENSE else repeats, threads).result()
            for method in methods
        ]


def table(case: Case, measurements: Sequence[Measurement], threads: int = 1) -> Table:
    """Lay the measurements out, with the dense method in float32, if it ran, as the unit of time."""
    ranks = ",".join(map(str, case.ranks))
    rows = Table(
        title=f"Recompression of {case.size} x {case.size}, ranks {ranks} -> {case.rank}",
        caption=(
            "qr and gram are fedkernels.stack_svd, dense is the sum and its full SVD; "
            f"median time, threads: {threads}; memory beside the factors, in multiples of them "
            f"({case.stack_bytes / 2**20:.1f} MiB); error against the best of rank {case.rank}"
        ),
    )
    for heading in ("method", "time", "dense / it", "extra memory", "error / optimum"):
        rows.add_column(heading, justify="left" if heading == "method" else "right")
    dense = next((m.seconds for m in measurements if m.method == BASELINE), None)
    for m in measurements:
        ratio = f"{dense / m.seconds:,.3g} x" if dense is not None else "-"
        extra = f"{m.extra_bytes / case.stack_bytes:.2f} x" if m.extra_bytes is not None else "-"
        error = f"1 + {m.error / m.optimum - 1:.1e}" if m.optimum else f"{m.error:.1e} / 0"
        rows.add_row(m.method, _duration(m.seconds), ratio, extra, error)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table; `arguments` are those of the command line by default."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.benchmarks.recompression", description=__doc__
    )
    parser.add_argument("--skip-dense", action="store_true", help="leave out the slow baseline")
    parser.add_argument("--size", type=int, default=Case.size, help="rows and columns")
    parser.add_argument("--ranks", type=_ranks, default=REFERENCE_RANKS, help="e.g. 64,32,16")
    parser.add_argument("--rank", type=int, default=Case.rank, help="rank to compress to")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each fast method")
    parser.add_argument(
        "--threads", type=int, default=1, help="more than 1 tells little on a busy machine"
    )
    options = parser.parse_args(arguments)
    case = Case(options.size, options.ranks, options.rank)
    methods = ["qr", "gram"] if options.skip_dense else ["qr", "gram", *_DENSE]
    console = table_console()
    with console.status("measuring; a dense SVD of this size takes from seconds to minutes"):
        measurements = compare(case, methods, options.repeats, options.threads)
    console.print(table(case, measurements, options.threads))


# stack_svd computes in float64; the baseline is the cheapest that one would write instead.
BASELINE = "dense, float32"
_DENSE = {BASELINE: torch.float32, "dense, float64": torch.float64}


def _runner(method: str) -> Callable[[Factors, int], Decomposition]:
    if method in _DENSE:
        return partial(dense_svd, dtype=_DENSE[method])
    return partial(_stack_svd, method=method)


def _stack_svd(factors: Factors, rank: int, method: str) -> Decomposition:
    return fk.stack_svd(factors, rank=rank, method=method)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
