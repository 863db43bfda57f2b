"""What a projected update is worth: estimator, wire and sketches, against their theory.

    python -m simulations.benchmarks.projection

The estimator 1/K sum_k <D, z_k> z_k has the mean D, the second moment (K + d + kappa - 2) / K, and the
cosine sqrt(K / (K + d)) to D. Ferret's published code gives D / 3. Sketches are compared with the best
approximation of their rank, for a change that stays the same while the basis follows it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fedkernels as fk
from aggregators import Basis, Layout, ProjectedGradient, Sketch, decode, encode
from aggregators.projected import shrinkage
from simulations.benchmarks.tables import table_console

ROUNDS = (0, 1, 2, 3, 5)


@dataclass(frozen=True)
class Estimator:
    """Means over the draws; ``gain`` is <E, D> / ||D||^2, of the unbiased estimate E.

    ``error`` is ||shrunk E - D||^2 / ||D||^2, and ``best`` the least that a scale can make it.
    ``lost``: coordinates that a float16 message made 0, of a change of 1e-9 an element; ``plain``: the
    same without units of their own.
    """

    probe: str
    elements: int
    count: int
    draws: int
    gain: float
    second_moment: float
    second_moment_theory: float
    cosine: float
    cosine_theory: float
    error: float
    best: float
    lost: float
    plain: float


@dataclass(frozen=True)
class Reading:
    """Error over the optimum of the rank, mean and worst over seeds, after each of ``ROUNDS``.

    ``numbers``: what the first sketch holds and what later ones do, over r (m + n).
    """

    spectrum: str
    rank: int
    oversampling: int
    wide: bool
    numbers: tuple[float, float]
    mean: tuple[float, ...]
    worst: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """Seconds for one matrix of ``elements`` and ``count`` probes: all at once, and one at a time."""

    elements: int
    count: int
    project: float
    project_singly: float
    rebuild: float
    rebuild_singly: float


def estimator(probe: str, rows: int, columns: int, count: int, draws: int) -> Estimator:
    """Project one random change on ``count`` probes, ``draws`` times, and rebuild it."""
    layout = Layout({"w": (rows, columns)})
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(rows, columns, generator=generator)
    size, elements = float(change.double().square().sum()), change.numel()
    shrink = shrinkage(count, elements, probe)
    gains, moments, cosines, errors = [], [], [], []
    for seed in range(draws):
        update = ProjectedGradient.of(layout, seed, {"w": change}, {"w": count}, probe)
        found = update.dense_tensor("w")
        inner, square = float((found * change).sum()), float(found.square().sum())
        gains.append(inner / size)
        moments.append(square / size)
        cosines.append(inner / math.sqrt(square * size))
        errors.append(1 + (shrink * shrink * square - 2 * shrink * inner) / size)
    tiny = ProjectedGradient.of(layout, 0, {"w": change * 1e-9}, {"w": count}, probe)
    again = decode(encode(tiny, "float16"), layout)
    assert isinstance(again, ProjectedGradient)
    return Estimator(
        probe, elements, count, draws, statistics.mean(gains), statistics.mean(moments),
        1 / shrink, statistics.mean(cosines), math.sqrt(count / (count + elements)),
        statistics.mean(errors), 1 - shrink, _zeros(again.coordinates["w"]),
        _zeros(tiny.coordinates["w"].half()),
    )  # fmt: skip


SPECTRA: dict[str, Callable[[Tensor], Tensor] | None] = {
    "random (Gaussian)": None,
    "i ** -0.5": lambda i: (i + 1) ** -0.5,
    "1 / i": lambda i: 1 / (i + 1),
    "i ** -2": lambda i: (i + 1) ** -2.0,
    "0.8 ** i": lambda i: 0.8**i,
    "0.5 ** i": lambda i: 0.5**i,
    "rank 4 and noise": lambda i: torch.where(i < 4, 1.0, 0.02),
}


def reading(
    spectrum: str, rank: int, wide: bool, seeds: int, rows: int = 576, columns: int = 192
) -> Reading:
    """Sketch one change again and again, refining the basis, and compare with its best rank-r part."""
    layout = Layout({"w": (rows, columns)})
    oversampling = rank
    errors: list[list[float]] = []
    sizes: list[int] = []
    for seed in range(seeds):
        change = _matrix(SPECTRA[spectrum], rows, columns, seed)
        optimum = float(torch.linalg.svdvals(change)[rank:].norm())
        basis = Basis.random(layout, ["w"], seed, rank, oversampling, wide)
        errors.append([])
        sizes = []
        for _ in range(max(ROUNDS) + 1):
            sizes.append(basis.size)
            sketch = Sketch.of(layout, basis, {"w": change})
            found = sketch.reconstruct(basis).dense()["w"]
            errors[-1].append(float((found - change).norm()) / optimum)
            basis = basis.refined(sketch)
    columnwise = [[row[number] for row in errors] for number in ROUNDS]
    return Reading(
        spectrum, rank, oversampling, wide,
        (sizes[0] / (rank * (rows + columns)), sizes[-1] / (rank * (rows + columns))),
        tuple(statistics.mean(c) for c in columnwise), tuple(max(c) for c in columnwise),
    )  # fmt: skip


def speed(rows: int = 576, columns: int = 1536, count: int = 512) -> Speed:
    """Time the kernels' one pass for all probes against one probe after another."""
    layout = Layout({"w": (rows, columns)})
    change = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    fk.noise(0, 0, (rows, columns))
    update = ProjectedGradient.of(layout, 1, {"w": change}, {"w": count})
    seeds = [fk.derive_seed(1, k) for k in range(count)]

    def project_singly() -> list[float]:
        exact = change.double()
        return [float((exact * fk.noise(s, 0, change.shape)).sum()) for s in seeds]

    def rebuild_singly() -> Tensor:
        total = torch.zeros(rows, columns, dtype=torch.float64)
        for seed, value in zip(seeds, update.coordinates["w"].tolist(), strict=True):
            total += value / count * fk.noise(seed, 0, (rows, columns)).double()
        return total

    return Speed(
        change.numel(), count,
        _seconds(lambda: ProjectedGradient.of(layout, 1, {"w": change}, {"w": count})),
        _seconds(project_singly), _seconds(lambda: update.dense_tensor("w")),
        _seconds(rebuild_singly),
    )  # fmt: skip


def main(
    draws: Annotated[int, typer.Option(min=2, help="of each estimator")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="of each sketch")] = 10,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Measure and print three tables: estimators, sketches, times."""
    torch.set_num_threads(threads)
    console = Console(stderr=True)
    with console.status("estimators"):
        estimators = [estimator(probe, 64, 48, 256, draws) for probe in fk.PROBES]
    with console.status("sketches"):
        readings = [
            reading(name, rank, wide, seeds)
            for wide in (True, False)
            for rank in (4, 8)
            for name in SPECTRA
        ]
    with console.status("times"):
        times = speed()
    if as_json:
        rows: list[Any] = [*estimators, *readings, times]
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)))
        return
    out = table_console()
    out.width = out.width if out.is_terminal else 130
    for table in (estimator_table(estimators), reading_table(readings), speed_table(times)):
        out.print(table)


def estimator_table(rows: Sequence[Estimator]) -> Table:
    """Measured against theory, a probe a row."""
    first = rows[0]
    found = Table(
        title=f"projection of {first.elements} elements on K = {first.count} probes,"
        f" {first.draws} draws",
        caption="bars: gain 1.00 ± 0.01, second moment within 2 %, cosine at least 0.98 of theory;"
        " float16: coordinates of a change of 1e-9 that arrive as 0 (without units of their own)",
    )
    for heading in ("probe", "gain", "second moment / theory", "cosine / theory",
                    "MMSE error / best", "float16 zeros"):  # fmt: skip
        found.add_column(heading, justify="left" if heading == "probe" else "right")
    for row in rows:
        found.add_row(
            row.probe, f"{row.gain:.4f}",
            f"{row.second_moment:.3f} / {row.second_moment_theory:.3f}"
            f" = {row.second_moment / row.second_moment_theory:.4f}",
            f"{row.cosine:.4f} / {row.cosine_theory:.4f} = {row.cosine / row.cosine_theory:.4f}",
            f"{row.error:.4f} / {row.best:.4f}", f"{row.lost:.0%} ({row.plain:.0%})",
        )  # fmt: skip
    return found


def reading_table(rows: Sequence[Reading]) -> Table:
    """Error over the optimum, a spectrum a row, mean and worst."""
    found = Table(
        title="sketch of a fixed change [576, 192]: error / best error of rank r, mean (worst)",
        caption="0: the random basis, wide as it is by default or not; then after so many refinements."
        " Numbers: of the first sketch and of later ones, over r (m + n). What is read back has more"
        " than r directions, hence less than 1. Bar: 1.5",
    )
    found.add_column("singular values")
    found.add_column("r + p")
    found.add_column("numbers")
    for number in ROUNDS:
        found.add_column(str(number), justify="right")
    for row in rows:
        cells = (f"{m:.2f} ({w:.2f})" for m, w in zip(row.mean, row.worst, strict=True))
        found.add_row(
            row.spectrum,
            f"{row.rank} + {row.oversampling}{', wide' if row.wide else ''}",
            f"{row.numbers[0]:.2f}, {row.numbers[1]:.2f}",
            *cells,
        )
    return found


def speed_table(row: Speed) -> Table:
    """Seconds, at once and singly."""
    found = Table(title=f"{row.elements:,} elements, {row.count} probes: seconds")
    for heading in ("", "at once", "one at a time", "ratio"):
        found.add_column(heading, justify="left" if not heading else "right")
    pairs: dict[str, tuple[float, float]] = {
        "project": (row.project, row.project_singly),
        "rebuild (float64)": (row.rebuild, row.rebuild_singly),
    }
    for name, (fast, slow) in pairs.items():
        found.add_row(name, f"{fast:.4f}", f"{slow:.4f}", f"{slow / fast:.0f} ×")
    return found


def _matrix(
    values: Callable[[Tensor], Tensor] | None, rows: int, columns: int, seed: int
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if values is None:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    count = min(rows, columns)
    sides = [
        torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    ]
    sizes = values(torch.arange(count, dtype=torch.float64))
    matrix: Tensor = (sides[0] * sizes) @ sides[1].T
    return matrix


def _zeros(values: Tensor) -> float:
    return float((values == 0).double().mean())


def _seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


if __name__ == "__main__":
    typer.run(main)
