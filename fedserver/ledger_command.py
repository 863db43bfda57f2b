"""``fedbraid ledger``: show, verify, replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedserver.ledger import Ledger, LedgerError

ledger_app = typer.Typer(help="Read and check the log of a run's rounds.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="A run folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]


@ledger_app.command()
def show(folder: Folder, as_json: Json = False) -> None:
    """The entries, and each node's verdict in every round."""
    ledger = Ledger(folder)
    console = Console()
    table = Table("entry", "node", "verdict", "share", "bytes up", box=box.SIMPLE_HEAD)
    for entry in ledger.entries():
        if as_json:
            print(json.dumps(vars(entry)))
            continue
        table.add_row(f"{entry.height} {entry.kind} {entry.round} {entry.hash[:12]}")
        for node in entry.content.get("nodes", ()):
            verdict = node["verdict"] + (f": {node['reason']}" if node["reason"] else "")
            share = f"{node['share']:.3f}" if node["share"] else ""
            table.add_row("", node["node"], escape(verdict), share, f"{node['bytes_up']:,}")
    if not as_json:
        console.print(table)
        console.print(f"head {ledger.head}", soft_wrap=True)
    ledger.close()


@ledger_app.command()
def verify(folder: Folder, as_json: Json = False) -> None:
    """Check the hash chain and every blob; exit code 1 when something was changed or lost."""
    ledger = Ledger(folder)
    problems = ledger.verify()
    if as_json:
        print(json.dumps({"head": ledger.head, "height": ledger.height, "problems": problems}))
    elif problems:
        Console().print("\n".join(problems), style="red", markup=False)
    else:
        Console().print(f"{ledger.height} entries sound, head {ledger.head}", soft_wrap=True)
    ledger.close()
    raise typer.Exit(1 if problems else 0)


@ledger_app.command()
def replay(folder: Folder, as_json: Json = False) -> None:
    """Aggregate every round again from its recorded updates and compare the state's digest."""
    # Replaying needs torch; showing and verifying do not.
    from fedserver.replay import Replayed
    from fedserver.replay import replay as run
    from fedserver.run_folder import recorded_configuration

    def tell(replayed: Replayed) -> None:
        if as_json:
            print(json.dumps({**vars(replayed), "equal": replayed.equal}))
        else:
            verdict = "equal" if replayed.equal else f"DIFFERS: found {replayed.found[:16]}"
            what = f"round {replayed.round}: {replayed.updates} updates"
            if replayed.rolled_back_to is not None:
                what = f"rolled back to round {replayed.rolled_back_to}"
            print(f"{what}, state {replayed.expected[:16]}: {verdict}")

    ledger = Ledger(folder)
    if problems := ledger.verify(state=False):
        raise LedgerError(f"{folder} is not sound, so it is not replayed:\n" + "\n".join(problems))
    found = run(ledger, recorded_configuration(ledger), tell)
    ledger.close()
    raise typer.Exit(0 if all(replayed.equal for replayed in found) else 1)
