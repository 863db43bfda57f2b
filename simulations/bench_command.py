"""``fedbraid bench``: what the parts of fedbraid take on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from simulations.benchmarks.tables import table_console

bench_app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


@bench_app.callback()
def bench() -> None:
    """Measure on this machine."""  # a callback keeps "kernels" a sub-command while it is the only one


@bench_app.command("kernels")
def kernels(
    family: Annotated[
        list[str] | None, typer.Option("--family", metavar="NAME", help="Only this family; repeat.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller and rougher, in a minute.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Time, reference, ratio and floor of every kernel, with the machine's limits of the same run."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from simulations.benchmarks.kernels import collection, machine_floor, table

    known = collection.families()
    if unknown := sorted(set(family or ()) - set(known)):
        raise typer.BadParameter(
            f"there is no {', '.join(unknown)}; there are: {', '.join(known)}",
            param_hint="--family",
        )
    chosen = {name: known[name] for name in known if not family or name in family}
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
        redirect_stdout=False,  # or JSON that goes to a file would go to the terminal instead
    )  # fmt: skip
    rows, failed = [], False
    with progress:
        task = progress.add_task("the machine's floor", total=1 + len(chosen))
        floor = machine_floor.measure(quick)
        if as_json:
            print(table.floor_json(floor), flush=True)
        waiting = [*chosen, "done"]
        progress.update(task, advance=1, description=waiting[0])
        for position, (name, result) in enumerate(collection.collect(chosen, quick)):
            if isinstance(result, Exception):
                failed = True
                progress.console.print(f"{name}: {type(result).__name__}: {result}", markup=False)
            else:
                rows += result
                for row in result if as_json else ():
                    print(table.row_json(row), flush=True)
            progress.update(task, advance=1, description=waiting[position + 1])
    if not as_json:
        console = table_console()
        # A file or a pipe has no width of its own, and 80 columns fold every cell.
        console.width = console.width if console.is_terminal else 160
        console.print(table.render(rows, floor))
    raise typer.Exit(1 if failed else 0)
