"""``fedbraid compare``: one scenario under several presets and seeds, a table and one page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedserver.configuration import ConfigurationError, load
from simulations.comparison_page import comparison
from simulations.intervals import Estimate, estimate
from simulations.live import LiveView
from simulations.run import simulate

Summary = dict[str, Any]


def compare(
    scenario: str,
    presets: Sequence[str],
    seeds: int,
    overrides: Sequence[str],
    folder: Path,
    *,
    as_json: bool = False,
) -> dict[str, list[Summary]]:
    """Run every preset with every seed; runs that the folder already holds are continued."""
    if not presets:
        raise ConfigurationError("name at least one preset to compare")
    # All configurations are checked before the first hour is spent.
    first = load(scenario, overrides).seed
    planned = [
        load(scenario, [*overrides, f'preset="{preset}"', f"seed={first + index}"])
        for preset in presets
        for index in range(seeds)
    ]
    if not all(configuration.evaluate for configuration in planned):
        raise ConfigurationError("evaluate = false leaves nothing to compare; take it out")
    summaries: dict[str, list[Summary]] = {}
    runs: list[Path] = []
    for configuration in planned:
        run = folder / f"{configuration.preset}-seed{configuration.seed}"
        with LiveView(json=as_json) as view:
            summary = simulate(configuration, run, view, resume=run.exists(), samples=0)
        summaries.setdefault(configuration.preset, []).append(summary)
        runs.append(run)
    page = comparison(runs, folder / "comparison.html")
    rows = [comparison_row(preset, found) for preset, found in summaries.items()]
    if as_json:
        print(json.dumps({"comparison": rows, "page": str(page)}))
    else:
        Console().print(_table(scenario, seeds, rows))
        Console().print(f"page: {page}", soft_wrap=True)
    return summaries


def comparison_row(preset: str, found: Sequence[Summary]) -> dict[str, Any]:
    """Means over seeds; [mean, half width of the 95 % interval or None] for loss and accuracy."""
    return {
        "preset": preset,
        "seeds": len(found),
        "before": statistics.fmean(s["before"]["loss"] for s in found),
        "after": _pair(estimate([s["after"]["loss"] for s in found])),
        "accuracy": _pair(estimate([s["after"]["accuracy"] for s in found])),
        "bytes_up": statistics.fmean(s["bytes_up"] for s in found),
        "bytes_down": statistics.fmean(s["bytes_down"] for s in found),
    }


def _pair(found: Estimate | None) -> list[float | None]:
    return [None, None] if found is None else [found.mean, found.half_width]


def _table(scenario: str, seeds: int, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"{scenario}, {seeds} seeds, evaluation over all nodes' held-out data")
    for heading in ("preset", "loss before", "loss after, 95 %", "accuracy, 95 %"):
        table.add_column(heading)
    table.add_column("MB up", justify="right")
    table.add_column("MB down", justify="right")
    for row in rows:
        table.add_row(
            row["preset"],
            f"{row['before']:.4f}",
            _interval(*row["after"]),
            _interval(*row["accuracy"]),
            f"{row['bytes_up'] / 1e6:.2f}",
            f"{row['bytes_down'] / 1e6:.2f}",
        )
    return table


def _interval(mean: float, half_width: float | None) -> str:
    return f"{mean:.4f}" if half_width is None else f"{mean:.4f} ± {half_width:.4f}"
