"""Kill processes of a real deployment at random: the ledger must end as if nothing had happened.

    python -m simulations.benchmarks.crash --kills 200

SIGKILL goes to the ServerApp, the SuperLink, its SuperExec, a SuperNode, a node's SuperExec, a stub in
the middle of its message, a resident worker or the process with its model. What dies is started again,
a run without its ServerApp is submitted again with ``resume``. A run that ends before the kills are used
up is checked, and the next one begins.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedserver.configuration import RunConfiguration, load
from fedserver.ledger import Ledger, LedgerError
from fedserver.replay import replay
from simulations.benchmarks.tables import table_console
from simulations.loopback import REPOSITORY, Loopback
from simulations.run import ledger_head, simulate
from simulations.tiny_model import write_scenario

VICTIMS = (
    "serverapp", "superlink", "superexec", "supernode", "nodeexec", "stub", "worker", "model",
)  # fmt: skip
PHASES = ("joining", "training", "evaluation")
# Without a ServerApp for so long, the run has to be submitted again: Flower starts one within a second.
GONE_SECONDS = 8.0
STUCK_SECONDS = 900.0
LOOK_SECONDS = 0.2
JOINING_SHARE = 0.2
SOON_SECONDS = 2.0


@dataclass
class Survival:
    """What the kills came to. ``killed``: by (victim, phase). ``problems``: of the finished runs."""

    expected: str
    killed: Counter[tuple[str, str]] = field(default_factory=Counter)
    heads: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    submissions: int = 0

    @property
    def sound(self) -> bool:
        """Every run ended with the uninterrupted run's head and a sound ledger."""
        return bool(self.heads) and set(self.heads) == {self.expected} and not self.problems


def survive(
    folder: Path,
    kills: int,
    *,
    rounds: int = 4,
    nodes: int = 2,
    seed: int = 0,
    pause: tuple[float, float] = (5.0, 30.0),
    victims: tuple[str, ...] = VICTIMS,
    tell: Callable[[str], None] = lambda text: None,
) -> Survival:
    """Run deployments until the kills are used up and the last run has ended."""
    scenario = write_scenario(folder / "scenario", rounds, nodes)
    configuration = load(str(scenario))
    simulate(configuration, folder / "local", lambda event: None, samples=0)
    found = Survival(ledger_head(folder / "local"))
    chance = random.Random(seed)
    while sum(found.killed.values()) < kills or not found.heads:
        number = len(found.heads)
        with Loopback(folder / f"deployment-{number}", nodes) as deployment:
            run = _Run(deployment, scenario, folder / f"run-{number}", rounds)
            _kill_until_done(run, found, kills, chance, pause, victims, tell)
        found.submissions += run.submissions
        found.heads.append(ledger_head(run.output))
        found.problems += _check(run.output, configuration)
        tell(f"run {number} ended with {found.heads[-1][:12]}, {found.problems or 'sound'}")
    return found


@dataclass
class _Run:
    deployment: Loopback
    scenario: Path
    output: Path
    rounds: int
    submissions: int = 0
    seen: float = float("-inf")

    def tend(self) -> None:
        """Start again what is gone; the run too."""
        self.deployment.tend()
        now = time.monotonic()
        if self.deployment.submitting() or self.deployment.processes("serverapp"):
            self.seen = now
        elif now - self.seen > GONE_SECONDS:
            resume = (self.output / "ledger.db").is_file()
            self.deployment.submit(
                REPOSITORY,
                f'scenario="{self.scenario}" output="{self.output}" resume={str(resume).lower()}',
            )
            self.submissions += 1
            self.seen = now

    def done(self) -> bool:
        return (self.output / "summary.json").is_file()

    def phase(self) -> str:
        """Where the run is, as its ledger says."""
        try:
            ledger = Ledger(self.output)
        except LedgerError:
            return "joining"
        try:
            last = ledger.last("round")
        except LedgerError:
            return "joining"
        finally:
            ledger.close()
        return "evaluation" if last is not None and last.round == self.rounds else "training"


def _kill_until_done(
    run: _Run,
    found: Survival,
    kills: int,
    chance: random.Random,
    pause: tuple[float, float],
    victims: tuple[str, ...],
    tell: Callable[[str], None],
) -> None:
    began = time.monotonic()
    due = began + chance.uniform(*pause)
    before = "joining"
    while not run.done():
        run.tend()
        now, phase = time.monotonic(), run.phase()
        if phase != before:
            # The last phase takes seconds: without this hardly a kill would meet it.
            due, before = min(due, now + chance.uniform(0, SOON_SECONDS)), phase
        if now - began > STUCK_SECONDS * (1 + sum(found.killed.values())):
            raise TimeoutError(run.deployment.logs())
        if now >= due and sum(found.killed.values()) < kills:
            # Most of a run's time is its beginning; most of the kills should not be.
            if phase != "joining" or chance.random() < JOINING_SHARE:
                # Kinds first: there is one ServerApp and there are many model processes.
                kinds = [kind for kind in victims if run.deployment.processes(kind)]
                kind = chance.choice(kinds) if kinds else ""
                if _kill(chance.choice(run.deployment.processes(kind) or [0])):
                    found.killed[kind, phase] += 1
                    tell(f"killed {kind} while {phase}")
            due = now + chance.uniform(*pause)
        time.sleep(LOOK_SECONDS)


def _kill(pid: int) -> bool:
    try:
        if pid:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return bool(pid)


def _check(folder: Path, configuration: RunConfiguration) -> list[str]:
    """Problems of a finished run: its chain, its replay, updates that are missing or counted twice."""
    ledger = Ledger(folder)
    try:
        problems = ledger.verify()
        entries = list(ledger.entries("round"))
        names = [node.name for node in configuration.nodes]
        for entry in entries:
            accepted = [r["node"] for r in entry.content["nodes"] if r["verdict"] == "accepted"]
            if sorted(accepted) != sorted(names):
                problems.append(f"round {entry.round}: updates of {accepted}, not of {names}")
        if [entry.round for entry in entries] != list(range(1, configuration.rounds + 1)):
            problems.append(f"rounds {[entry.round for entry in entries]}")
        for replayed in replay(ledger, configuration):
            if not replayed.equal:
                problems.append(f"round {replayed.round} replays differently")
        return problems
    finally:
        ledger.close()


def main(
    kills: Annotated[int, typer.Option(min=1)] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each run.")] = 4,
    nodes: Annotated[int, typer.Option(min=1)] = 2,
    seed: int = 0,
    shortest: Annotated[float, typer.Option(help="Seconds between kills, at least.")] = 5.0,
    longest: Annotated[float, typer.Option(help="And at most.")] = 30.0,
    victim: Annotated[list[str] | None, typer.Option(help="Only processes of this kind.")] = None,
) -> None:
    """Print kills by victim and phase, and what became of the runs."""
    console = table_console()
    with tempfile.TemporaryDirectory(prefix="fedbraid-") as name:
        found = survive(
            Path(name), kills, rounds=rounds, nodes=nodes, seed=seed, pause=(shortest, longest),
            victims=tuple(victim) if victim else VICTIMS, tell=console.print,
        )  # fmt: skip
    table = Table(title=f"{sum(found.killed.values())} kills, {len(found.heads)} finished runs")
    for column in ("killed", *PHASES, "all"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for kind in VICTIMS:
        counts = [found.killed[kind, phase] for phase in PHASES]
        table.add_row(kind, *(str(count) for count in counts), str(sum(counts)))
    console.print(table)
    equal = sum(head == found.expected for head in found.heads)
    console.print(
        f"{equal} of {len(found.heads)} runs ended with the uninterrupted run's head"
        f" {found.expected[:16]}; {found.submissions} submissions; problems: {found.problems or 'none'}"
    )
    raise typer.Exit(0 if found.sound else 1)


if __name__ == "__main__":
    typer.run(main)
