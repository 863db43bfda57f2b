"""``fedbraid compare``: one scenario under several presets and seeds, a table and one page."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aggregators.presets import PRESETS
from fedserver.configuration import ConfigurationError, load
from fedserver.intervals import Estimate, estimate
from simulations.comparison_page import comparison
from simulations.live import LiveView
from simulations.run import simulate

Summary = dict[str, Any]
# A plus may stand in a value, as in 1e+3; one before a key begins a change.
CHANGE = re.compile(r"\+(?=[a-z][A-Za-z0-9_.-]*=)")


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
        (variant, load(scenario, [*overrides, *changes_of(variant, scenario), f"seed={seed}"]))
        for variant in presets
        for seed in range(first, first + seeds)
    ]
    if not all(configuration.evaluate for _, configuration in planned):
        raise ConfigurationError("evaluate = false leaves nothing to compare; take it out")
    summaries: dict[str, list[Summary]] = {}
    runs: list[Path] = []
    for variant, configuration in planned:
        run = folder / f"{variant.replace('/', '_')}-seed{configuration.seed}"
        with LiveView(json=as_json) as view:
            summary = simulate(configuration, run, view, resume=run.exists(), samples=0)
        summaries.setdefault(variant, []).append(summary)
        runs.append(run)
    page = comparison(runs, folder / "comparison.html")
    rows = [comparison_row(preset, found) for preset, found in summaries.items()]
    if as_json:
        print(json.dumps({"comparison": rows, "page": str(page)}))
    else:
        Console().print(_table(scenario, seeds, rows))
        Console().print(f"page: {page}", soft_wrap=True)
    return summaries


def changes_of(variant: str, scenario: str) -> list[str]:
    """The overrides that a variant stands for: PRESET, or PRESET+key=value+key=value.

    A preset of one strand is one of all nodes, whatever the scenario's nodes say; where it trains whole
    weights, no node's base is quantised.
    """
    preset, *changes = CHANGE.split(variant)
    strand = PRESETS[preset].strand if preset in PRESETS else None
    nodes = load(scenario).nodes if strand is not None else ()
    strands = [f'nodes.{place}.strand="{strand}"' for place in range(len(nodes))]
    if strand == "projected":
        strands += [f'nodes.{place}.base_format="full"' for place in range(len(nodes))]
    return [*strands, f'preset="{preset}"', *changes]


def comparison_row(preset: str, found: Sequence[Summary]) -> dict[str, Any]:
    """Means over seeds; [mean, half width of the 95 % interval or None] for loss and accuracy.

    Rounds are those of all seeds: one without its quorum left the model as it was.
    """
    return {
        "preset": preset,
        "seeds": len(found),
        "rounds": sum(s["rounds"] for s in found),
        "rounds_with_quorum": sum(s["rounds_with_quorum"] for s in found),
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
    table.add_column("rounds with quorum", justify="right")
    table.add_column("MB up", justify="right")
    table.add_column("MB down", justify="right")
    for row in rows:
        table.add_row(
            row["preset"],
            f"{row['before']:.4f}",
            _interval(*row["after"]),
            _interval(*row["accuracy"]),
            _quorum(row["rounds_with_quorum"], row["rounds"]),
            f"{row['bytes_up'] / 1e6:.2f}",
            f"{row['bytes_down'] / 1e6:.2f}",
        )
    return table


def _quorum(reached: int, rounds: int) -> str:
    told = f"{reached} of {rounds}"
    return told if reached == rounds else f"[yellow]{told}[/yellow]"


def _interval(mean: float, half_width: float | None) -> str:
    return f"{mean:.4f}" if half_width is None else f"{mean:.4f} ± {half_width:.4f}"
