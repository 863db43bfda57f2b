"""The kernel benchmark on paper: one table for people, one JSON object a line for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from simulations.benchmarks.kernels.machine_floor import MachineFloor
from simulations.benchmarks.kernels.row import Row


def floor_json(floor: MachineFloor) -> str:
    """Return the machine's floor as one line: {"machine": {...}}; rows have "family" instead."""
    return json.dumps({"machine": dataclasses.asdict(floor)}, ensure_ascii=False)


def row_json(row: Row) -> str:
    """Return a row as one line, with the ratios that follow from its times."""
    derived = {"ratio": row.ratio, "floor_share": row.floor_share}
    return json.dumps({**dataclasses.asdict(row), **derived}, ensure_ascii=False)


def floor_text(floor: MachineFloor) -> str:
    """Describe the machine and its limits in two lines."""
    return (
        f"{floor.processor}, threads: {floor.threads}, backend: {floor.backend}\n"
        f"copy {floor.copy_gb_per_s:.1f} GB/s,"
        f" read-modify-write {floor.read_modify_write_gb_per_s:.1f} GB/s,"
        f" matmul fp32 {floor.fp32_matmul_gflop_per_s:.0f} GFLOP/s,"
        f" bf16 {floor.bf16_matmul_gflop_per_s:.0f} GFLOP/s"
    )


def render(rows: Iterable[Row], floor: MachineFloor) -> Table:
    """Lay all rows out in one table with the machine's floor as its caption."""
    table = Table(title="fedkernels", caption=floor_text(floor), caption_justify="left")
    table.add_column("family", no_wrap=True)
    table.add_column("primitive", overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("reference", overflow="fold")
    table.add_column("its time", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("floor", overflow="fold")
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("bar", overflow="fold")
    family = ""
    for row in rows:
        if family and row.family != family:
            table.add_section()
        shown = row.family if row.family != family else ""
        family = row.family
        table.add_row(*map(Text, _cells(shown, row)))
    return table


def duration(seconds: float) -> str:
    """Return a time with three digits in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _cells(family: str, row: Row) -> tuple[str, ...]:
    name = "\n".join([row.name, *(f"  {key}: {_figure(v)}" for key, v in row.extra.items())])
    floor = f"{row.floor} {duration(row.floor_seconds)}" if row.floor_seconds is not None else ""
    return (
        family,
        name,
        duration(row.seconds),
        row.reference,
        duration(row.reference_seconds) if row.reference_seconds is not None else "",
        f"{row.ratio:.3g} ×" if row.ratio is not None else "",
        floor,
        f"{row.floor_share:.0%}" if row.floor_share is not None else "",
        row.target,
    )


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
