"""Kill a run at random moments and continue it: the ledger must end as if nothing had happened.

    python -m simulations.benchmarks.resume --scenario SCENARIO --kills 50

Every attempt is a process of its own that dies by SIGKILL at a random moment of a run. A run that ends
before the kills are used up is checked, and the next one begins in a fresh folder.
"""

from __future__ import annotations

import multiprocessing
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedserver.configuration import RunConfiguration, load
from fedserver.ledger import Ledger
from fedserver.replay import replay
from simulations.benchmarks.tables import table_console
from simulations.run import ledger_head, simulate

# Children are forked from a process that has imported these and done nothing else.
PRELOADED = ["simulations.run", "peft", "transformers.models.llama.modeling_llama", "flwr_datasets"]


@dataclass(frozen=True)
class Survival:
    """What 50 kills came to. ``heads``: of the runs that finished; ``problems``: of their ledgers."""

    kills: int
    finished: int
    expected: str
    heads: tuple[str, ...]
    problems: tuple[str, ...]
    rounds_committed_at_kill: tuple[int, ...]

    @property
    def sound(self) -> bool:
        """Every finished run has the uninterrupted run's head and a sound ledger."""
        return not self.problems and set(self.heads) == {self.expected}


def survive(
    scenario: str, overrides: Sequence[str], folder: Path, kills: int, seed: int = 0
) -> Survival:
    """Kill runs of a scenario ``kills`` times, always continue, and compare with one left alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    warm = context.Process(target=_nothing)
    warm.start()
    warm.join()
    configuration = load(scenario, overrides)
    reference = folder / "uninterrupted"
    started = time.monotonic()
    child = context.Process(target=_attempt, args=(scenario, list(overrides), reference))
    child.start()
    child.join()
    duration = time.monotonic() - started
    chance = random.Random(seed)
    done = 0
    heads: list[str] = []
    problems: list[str] = []
    committed: list[int] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("killing and continuing", total=kills)
        number = 0
        while done < kills or number == len(heads):
            run = folder / f"run-{len(heads)}"
            number = len(heads)
            child = context.Process(target=_attempt, args=(scenario, list(overrides), run))
            child.start()
            # After the last kill the run is left to finish.
            child.join(chance.uniform(0.0, duration) if done < kills else None)
            if child.is_alive():
                child.kill()
                child.join()
                done += 1
                committed.append(_rounds(run))
                progress.update(task, completed=done)
            elif child.exitcode == 0:
                heads.append(ledger_head(run))
                problems += _check(run, configuration)
            else:
                problems.append(f"an attempt ended with exit code {child.exitcode}")
                break
            if done >= kills and heads and number < len(heads):
                break
    return Survival(
        done, len(heads), ledger_head(reference), tuple(heads), tuple(problems), tuple(committed)
    )


def _nothing() -> None:
    """The first child waits for the imports; the time of a run must not include them."""


def _attempt(scenario: str, overrides: list[str], folder: Path) -> None:
    configuration = load(scenario, overrides)
    simulate(configuration, folder, lambda event: None, resume=folder.exists(), samples=0)


def _rounds(folder: Path) -> int:
    if not (folder / "ledger.db").is_file():
        return 0
    ledger = Ledger(folder)
    try:
        return sum(1 for _ in ledger.entries("round"))
    finally:
        ledger.close()


def _check(folder: Path, configuration: RunConfiguration) -> list[str]:
    ledger = Ledger(folder)
    try:
        problems = ledger.verify()
        rounds = [entry.round for entry in ledger.entries("round")]
        if rounds != list(range(1, configuration.rounds + 1)):
            problems.append(f"rounds {rounds} are not 1 to {configuration.rounds}")
        problems += [
            f"round {replayed.round} replays differently"
            for replayed in replay(ledger, configuration)
            if not replayed.equal
        ]
        return problems
    finally:
        ledger.close()


def main(
    scenario: Annotated[str, typer.Option(help="Scenario to run.")] = "quickstart",
    override: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    kills: Annotated[int, typer.Option(min=1)] = 50,
    seed: int = 0,
) -> None:
    """Kill a run at random moments, continue it, and compare ledger heads."""
    with tempfile.TemporaryDirectory() as scratch:
        found = survive(scenario, override or [], Path(scratch), kills, seed)
    table = Table("SIGKILLs", "runs finished", "heads equal", "problems", "rounds at the kills")
    table.add_row(
        str(found.kills),
        str(found.finished),
        "yes" if set(found.heads) == {found.expected} else "NO",
        "; ".join(found.problems) or "none",
        " ".join(map(str, found.rounds_committed_at_kill)),
    )
    table_console().print(table)
    raise typer.Exit(0 if found.sound else 1)


if __name__ == "__main__":
    typer.run(main)
