"""What it takes to have the weights of a run anew: base and 4,096 seeds, against forward passes.

    python -m simulations.benchmarks.rebuild

A node that joins late has the base and one total a seed. The reference adds one `torch.normal` probe a
seed to every tensor, as FedKSeed's code does; it is timed on a few seeds and multiplied.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.table import Table

from aggregators import Layout
from aggregators.probe_sum import ProbeSum
from aggregators.view import View
from fedclient import base_model
from fedclient.state import rebuilt
from simulations.benchmarks.tables import table_console

BATCH, LENGTH = 4, 128
REFERENCE_SEEDS = 2
BAR = "≤ 12"


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 4096,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Time forward passes, rebuilds along two kinds of probes, and the reference."""
    torch.set_num_threads(threads)
    base = base_model.load(base_model.DEFAULT_MODEL)
    layout = Layout.from_model(base.model)
    ids = torch.randint(100, 1000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))

    def forward() -> None:
        with torch.no_grad():
            base.model(input_ids=ids, use_cache=False)

    def reference() -> None:
        for seed in range(REFERENCE_SEEDS):
            generator = torch.Generator().manual_seed(seed)
            for spec in layout:
                torch.zeros(spec.shape).add_(torch.normal(0, 1, spec.shape, generator=generator))

    passes = _seconds(forward, repeats)
    table = Table(title=f"SmolLM2-135M in float32, {seeds:,} seeds, {threads} threads")
    for heading in ("", "seconds", f"forward passes of {BATCH} × {LENGTH} tokens", "bar"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("plain forward pass", f"{passes:.2f}", "1", "")
    totals = torch.randint(-999, 1000, (seeds,), generator=torch.Generator().manual_seed(2))
    for probe in ("rademacher", "rank1"):
        places = dict.fromkeys((spec.name for spec in layout), 0)
        view = View(sums=(ProbeSum(layout, 1, probe, -40, [totals], places),))
        taken = _seconds(lambda view=view: rebuilt(base.model, layout, view), 1)  # type: ignore[misc]
        table.add_row(f"rebuild, {probe}", f"{taken:.2f}", f"{taken / passes:.1f}", BAR)
    slow = _seconds(reference, 1) / REFERENCE_SEEDS * seeds
    table.add_row("reference, torch.normal", f"{slow:.0f}", f"{slow / passes:,.0f}", "")
    table_console().print(table)


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """The median time of a call, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    typer.run(main)
