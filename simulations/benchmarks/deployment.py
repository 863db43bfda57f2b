"""What a round costs before any work is done, on a real SuperLink with real SuperNodes.

    python -m simulations.benchmarks.deployment --rounds 8

Two nodes train one step of a tiny model in their resident workers, so that what is left is transport:
polls, processes, messages. Beside it a Flower App that does nothing, on Flower as it comes; it imports
no torch, which with Flower's own executor would be paid for every message again.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedclient.resident.connection import Connection
from fedserver.ledger import Ledger
from simulations.benchmarks.plain_flower import application
from simulations.benchmarks.tables import table_console
from simulations.loopback import REPOSITORY, Loopback
from simulations.tiny_model import write_scenario

PATIENCE_SECONDS = 900.0


@dataclass(frozen=True)
class Cost:
    """``rounds``: seconds of each. ``stubs``: CPU-seconds of each ClientApp process."""

    rounds: tuple[float, ...]
    stubs: tuple[float, ...]
    model_starts: tuple[int, ...] = ()


def resident_cost(folder: Path, rounds: int, nodes: int) -> Cost:
    """A run of this project with resident workers and lean stubs."""
    scenario, output = write_scenario(folder / "scenario", rounds, nodes), folder / "run"
    times = folder / "stub-times"
    with Loopback(folder / "deployment", nodes, stub_times=times) as deployment:
        deployment.submit(REPOSITORY, f'scenario="{scenario}" output="{output}"')
        _wait_for((output / "summary.json").is_file, deployment)
        starts = []
        for index in range(nodes):
            with Connection(folder / f"deployment/node-{index}/worker/worker.sock") as connection:
                starts.append(int(connection.health()["starts"]))
    ledger = Ledger(output)
    seconds = tuple(float(entry.wall["seconds"]) for entry in ledger.entries("round"))
    ledger.close()
    return Cost(seconds, _cpu_seconds(times), tuple(starts))


def plain_cost(folder: Path, rounds: int, nodes: int) -> Cost:
    """Flower's FedAvg with a client that does nothing."""
    app, ends, times = application.write(folder / "app"), folder / "ends.json", folder / "times"
    with Loopback(folder / "deployment", nodes, resident=False, stub_times=times) as deployment:
        deployment.submit(app, f'times="{ends}" rounds={rounds}')
        _wait_for(ends.is_file, deployment)
    found = json.loads(ends.read_text())
    # The first is before the first round, the last after the run's end.
    seconds = [after - before for before, after in pairwise(found[:-1])]
    return Cost(tuple(seconds), _cpu_seconds(times))


def _wait_for(done: Callable[[], bool], deployment: Loopback) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(deployment.logs())
        time.sleep(0.5)


def _cpu_seconds(path: Path) -> tuple[float, ...]:
    """User and system time of the children, the second line of what the shell's ``times`` writes."""
    lines = path.read_text().splitlines()[1::2]
    found = []
    for line in lines:
        parts = re.findall(r"(\d+)m([\d.]+)s", line)
        found.append(sum(60 * int(minutes) + float(seconds) for minutes, seconds in parts))
    return tuple(found)


def main(
    rounds: Annotated[int, typer.Option(min=2)] = 8,
    nodes: Annotated[int, typer.Option(min=1)] = 2,
    plain: Annotated[bool, typer.Option(help="Also run plain Flower.")] = True,
) -> None:
    """Print seconds a round and CPU-seconds a message."""
    table = Table(title=f"A round without work, {nodes} nodes on loopback")
    for column in ("", "round s, median", "slowest", "CPU s a message, median", "most"):
        table.add_column(column, justify="left" if not column else "right")
    with tempfile.TemporaryDirectory(prefix="fedbraid-") as name:
        found = {"fedbraid": resident_cost(Path(name) / "own", rounds, nodes)}
        if plain:
            found["plain Flower, no torch"] = plain_cost(Path(name) / "plain", rounds, nodes)
    for label, cost in found.items():
        table.add_row(
            label,
            f"{statistics.median(cost.rounds):.2f}",
            f"{max(cost.rounds):.2f}",
            f"{statistics.median(cost.stubs):.2f}",
            f"{max(cost.stubs):.2f}",
        )
    console = table_console()
    console.print(table)
    console.print(f"model processes started, by node: {found['fedbraid'].model_starts}")


if __name__ == "__main__":
    typer.run(main)
