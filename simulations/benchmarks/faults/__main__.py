"""Faults of network, clock, disk and processes against a joined deployment, and what becomes of them.

    python -m simulations.benchmarks.faults
    python -m simulations.benchmarks.faults --only partition --only churn

A server behind its front door and five devices train a tiny model; each device is a host (a network
namespace) behind a link that carries IP packets and can lose, queue or hold them back. Every fault
hits a run in its first round. Needs Linux, root, nginx and a C compiler.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simulations.benchmarks.chaos.host import live_apart
from simulations.benchmarks.faults.catalogue import CATALOGUE, Fault, Lifted
from simulations.benchmarks.faults.laboratory import (
    ROUNDS,
    Laboratory,
    Run,
    faults_of,
    wait_until,
)
from simulations.benchmarks.tables import table_console
from simulations.run import ledger_head

SERVING_SECONDS = 60.0
# How long a node is waited for before it counts as lost.
LOST_SECONDS = 240.0


@dataclass(frozen=True)
class Finding:
    """What became of one run. ``served``: seconds until a node's answer counted again, by node; 0 for
    one that the fault did not keep from answering.
    """

    end: str
    sound: bool
    named: tuple[str, ...]
    served: dict[str, float | None]
    seconds: float

    @property
    def good(self) -> bool:
        """Whether end, model and ledger are as they must be, and every node serves again in time."""
        times = list(self.served.values())
        return self.sound and all(t is not None and t <= SERVING_SECONDS for t in times)


def suffer(laboratory: Laboratory, fault: Fault) -> Finding:
    """Run the scenario, inflict the fault, and see."""
    expected = laboratory.undisturbed(fault.overrides)
    began = time.monotonic()
    run = laboratory.start_run(fault.name, fault.overrides)
    wait_until(lambda: run.ended or run.round() >= 1)
    lifted = fault.inflict(laboratory, run)
    over = run.ended
    served = _serving_again(laboratory, run, fault, lifted)
    if over and run.wait() == 0 and ledger_head(run.folder) == expected:
        # The run needed every answer and was over before the fault: it had the node's all along.
        for node in served:
            if served[node] is not None and run.accepted_after(node, lifted[node]) is None:
                served[node] = 0.0
    code = run.wait()
    words, allowed = "ended", fault.allows(code)
    if code != 0:
        words = f"stopped ({run.told.splitlines()[-1]}), resumed"
        run = laboratory.start_run(fault.name, fault.overrides, resume=True)
        code = run.wait()
    if code != 0:
        return Finding(run.told.splitlines()[-1], False, (), served, time.monotonic() - began)
    same = ledger_head(run.folder) == expected
    problems, named = faults_of(run.folder, laboratory.configuration(fault.overrides))
    words += ": the undisturbed head" if same else ": another head, replayed"
    sound = allowed and not problems and (same or bool(named))
    return Finding(
        f"{words}{''.join(f'; {p}' for p in problems)}", sound, tuple(named), served,
        time.monotonic() - began,
    )  # fmt: skip


def _serving_again(
    laboratory: Laboratory, run: Run, fault: Fault, lifted: Lifted
) -> dict[str, float | None]:
    """By node, seconds from the fault's end to its first answer that counted; None: there was none.

    Where the run is over by then, or had stopped, a roll call asks: a run of one round, whose
    beginning is counted.
    """
    served: dict[str, float | None] = dict.fromkeys(lifted)
    runs, until = [run], time.monotonic() + LOST_SECONDS
    while time.monotonic() < until:
        for node in served:
            times = [one.accepted_after(node, lifted[node]) for one in runs]
            found = [moment for moment in times if moment is not None]
            served[node] = min(found) - lifted[node] if found else None
        if all(seconds is not None for seconds in served.values()):
            break
        if runs[-1].ended and len(runs) < 10:
            name = f"{fault.name}-roll-call-{len(runs)}"
            runs.append(laboratory.start_run(name, ("rounds=1",)))
        time.sleep(0.2)
    for one in runs[1:]:
        one.wait()
    return served


def main(
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this fault.")] = None,
    devices: Annotated[int, typer.Option(min=2)] = 5,
) -> None:
    """Print one row a fault: how the run ended, and when the nodes served again."""
    known = [fault.name for fault in CATALOGUE]
    for name in only or ():
        if name not in known:
            sys.exit(f"error: there is no fault {name!r}; there are: {', '.join(known)}")
    try:
        live_apart()
    except PermissionError as error:
        sys.exit(f"error: {error}")
    progress, found = Console(stderr=True), {}
    with tempfile.TemporaryDirectory(prefix="fedbraid-") as name:
        progress.print(f"{devices} devices join")
        with Laboratory(Path(name), devices) as laboratory:
            for fault in CATALOGUE:
                if only and fault.name not in only:
                    continue
                progress.print(f"{fault.name} …")
                finding = found[fault.name] = suffer(laboratory, fault)
                progress.print(f"{fault.name}: {finding}", markup=False)
                if not finding.good:
                    progress.print(laboratory.logs(), markup=False, highlight=False)
    _print(found, devices)
    raise typer.Exit(0 if all(finding.good for finding in found.values()) else 1)


def _print(found: dict[str, Finding], devices: int) -> None:
    table = Table(title=f"{devices} devices, {ROUNDS} rounds; packets over TUN links")
    for column in ("fault", "run", "not counted, as the ledger says", "serves again, s", ""):
        table.add_column(column, justify="right" if column.endswith(" s") else "left")
    for name, finding in found.items():
        times = [f"{t:.0f}" if t is not None else "never" for t in finding.served.values()]
        table.add_row(
            name, escape(finding.end), ", ".join(finding.named), " ".join(times),
            "good" if finding.good else "BAD",
        )  # fmt: skip
    table_console().print(table)


if __name__ == "__main__":
    typer.run(main)
