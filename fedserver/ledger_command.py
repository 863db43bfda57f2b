"""``fedbraid ledger``: show, verify, replay, likeness, distances, prove, check, migrate."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fedserver.control import OPERATOR
from fedserver.ledger import Ledger, LedgerError
from fedserver.wording import action_words, printable, who_words

ledger_app = typer.Typer(help="Read and check the log of a run's rounds.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="A run folder.")]
Key = Annotated[
    str | None,
    typer.Option(
        help="The server's public key, hexadecimal or its file; default: the folder's own."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]


@ledger_app.command()
def show(folder: Folder, as_json: Json = False) -> None:
    """The entries, each node's verdict in every round, and what operators did and why."""
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
            name, told = escape(printable(node["node"])), escape(printable(verdict))
            table.add_row("", name, told, share, f"{node['bytes_up']:,}")
        if entry.kind == OPERATOR:
            done = f"{action_words(entry.content)} by {who_words(entry.content)}"
            told = f"{done}: {entry.content.get('reason')}"
            table.add_row("", "", escape(printable(told)))
    if not as_json:
        console.print(table)
        console.print(f"head {ledger.head}", soft_wrap=True)
    ledger.close()


@ledger_app.command()
def verify(folder: Folder, key: Key = None, as_json: Json = False) -> None:
    """Check chain, seals, signatures and blobs; exit code 1 when something was changed or lost."""
    ledger = Ledger(folder)
    problems = ledger.verify(key=public_key(key) if key else None)
    if as_json:
        print(json.dumps({"head": ledger.head, "height": ledger.height, "problems": problems}))
    elif problems:
        Console().print("\n".join(problems), style="red", markup=False)
    else:
        signed = sum(len(entry.signatures) for entry in ledger.entries())
        Console().print(
            f"{ledger.height} entries sound, {signed} signed replies, head {ledger.head}",
            soft_wrap=True,
        )
    ledger.close()
    raise typer.Exit(1 if problems else 0)


@ledger_app.command()
def likeness(
    folder: Folder,
    round_number: Annotated[int, typer.Option("--round", min=1)],
    as_json: Json = False,
) -> None:
    """How alike the nodes' changes of a round are, across families: cosines, and their lengths."""
    from fedserver.likeness import likeness as measure
    from fedserver.run_folder import recorded_configuration

    ledger = Ledger(folder)
    found = measure(ledger, recorded_configuration(ledger), round_number)
    ledger.close()
    lengths, cosines = found.lengths.tolist(), found.cosines.tolist()
    if as_json:
        for node, family, length, row in zip(
            found.nodes, found.families, lengths, cosines, strict=True
        ):
            told = dict(zip(found.nodes, row, strict=True))
            print(json.dumps({"node": node, "family": family, "length": length, "cosines": told}))
        return
    table = Table("node", "family", "length", *found.nodes, box=box.SIMPLE_HEAD)
    for node, family, length, row in zip(
        found.nodes, found.families, lengths, cosines, strict=True
    ):
        table.add_row(node, family, f"{length:.4g}", *(f"{cosine:+.2f}" for cosine in row))
    table.caption = f"cosines, each within about {2 * found.error:.2f}"
    Console().print(table)


@ledger_app.command()
def distances(
    folder: Folder,
    round_number: Annotated[
        int | None, typer.Option("--round", min=1, help="Which round; default: the newest.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How far each node's update of a round lies from its family's mean, and how like the others'."""
    from rich.progress import Progress

    from fedserver.distances import measure
    from fedserver.run_folder import recorded_configuration

    ledger = Ledger(folder)
    console = Console()
    errors = Console(stderr=True)
    hidden = as_json or not errors.is_terminal
    with Progress(console=errors, transient=True, disable=hidden) as progress:
        task, told = progress.add_task(""), ("", 0)

        def tell(what: str, done: int, of: int) -> None:
            nonlocal told
            progress.update(task, description=what, completed=done, total=of)
            if as_json and told != (what, 20 * done // of):
                told = (what, 20 * done // of)
                line = {"event": "progress", "what": what, "done": done, "of": of}
                print(json.dumps(line), file=sys.stderr, flush=True)

        entry, found = measure(ledger, recorded_configuration(ledger), round_number, tell)
    ledger.close()
    if as_json:
        for one in found:
            print(json.dumps({"round": entry.round, "entry": entry.hash, **vars(one)}))
        return
    table = Table(
        Column("node", overflow="fold"),
        *("family", "share", "norm", "distance", "÷ median", "cosine"),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for one in found:
        ratio = "" if one.over_median is None else f"{one.over_median:.2f}"
        cosine = "" if one.cosine is None else f"{one.cosine:+.3f}"
        node = f"{one.node} (sum of its devices)" if one.edge else one.node
        lengths = (f"{one.norm:.4g}", f"{one.distance:.4g}")
        table.add_row(
            escape(node), one.family.replace("_", " "), f"{one.share:.3f}", *lengths, ratio, cosine
        )
    table.caption = (
        f"round {entry.round}: share of the family's mean, distance from it, that over the median of"
        " the family's distances, cosine to the mean of the others"
    )
    console.print(table)


@ledger_app.command()
def prove(
    folder: Folder,
    node: Annotated[str, typer.Option(help="Name of the node.")],
    round_number: Annotated[int, typer.Option("--round", min=1)],
    target: Annotated[Path, typer.Option("--to", help="File to write.")] = Path("proof.json"),
) -> None:
    """Write a proof that a node's reply is in the ledger; 'ledger check' needs no ledger for it."""
    from fedserver.inclusion import prove as run

    ledger = Ledger(folder)
    proof = run(ledger, node, round_number)
    ledger.close()
    target.write_text(proof, encoding="utf-8")
    print(target)


@ledger_app.command()
def check(
    proof: Annotated[Path, typer.Argument(help="A file that 'ledger prove' wrote.")],
    key: Annotated[str, typer.Option(help="The server's public key: hexadecimal, or its file.")],
    as_json: Json = False,
) -> None:
    """Check a proof by the server's public key alone; exit code 1 when it proves nothing."""
    from fedserver.inclusion import ProofError, read_proof
    from fedserver.inclusion import check as run

    try:
        proven = run(read_proof(proof), public_key(key))
    except ProofError as error:
        print(
            json.dumps({"proven": False, "problem": str(error)}) if as_json else f"{proof}: {error}"
        )
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"proven": True, **vars(proven)}))
    else:
        print(
            f"{proven.node}'s reply to round {proven.round} ({proven.verdict}, {proven.update}) is"
            f" entry {proven.height} of the {proven.entries} under the head {proven.head}"
        )


@ledger_app.command()
def migrate(
    folder: Folder,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="Private key that seals the run.")
    ] = None,
) -> None:
    """Bring an earlier version's ledger up to date, and its checkpoint."""
    ledger = Ledger(folder, write=True, key_file=key_file)
    print(f"{ledger.height} entries, head {ledger.head}")
    ledger.close()


@ledger_app.command("key")
def show_key(folder: Folder) -> None:
    """Print the public key that the run is sealed with, to be given to those who check."""
    from fedserver.checkpoint import read_checkpoint
    from fedserver.statements import SealError, open_seal

    Ledger(folder).close()
    try:
        print(open_seal(read_checkpoint(folder)).key)
    except SealError as error:
        raise LedgerError(f"{folder}: the checkpoint was changed: {error}") from None


@ledger_app.command()
def replay(
    folder: Folder,
    last: Annotated[
        int | None, typer.Option("--round", min=1, help="Stop after this round.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Aggregate every round again from its recorded updates and compare the state's digest."""
    # Replaying and verifying need torch; showing does not.
    from fedserver.replay import Replayed
    from fedserver.replay import replay as run
    from fedserver.run_folder import recorded_configuration

    def tell(replayed: Replayed) -> None:
        if as_json:
            print(json.dumps({**vars(replayed), "equal": replayed.equal}), flush=True)
        else:
            verdict = "equal" if replayed.equal else f"DIFFERS: found {replayed.found[:16]}"
            what = f"round {replayed.round}: {replayed.updates} updates"
            if replayed.rolled_back_to is not None:
                what = f"rolled back to round {replayed.rolled_back_to}"
            print(f"{what}, state {replayed.expected[:16]}: {verdict}")

    ledger = Ledger(folder)
    if problems := ledger.verify(state=False):
        raise LedgerError(f"{folder} is not sound, so it is not replayed:\n" + "\n".join(problems))
    found = run(ledger, recorded_configuration(ledger), tell, last=last)
    ledger.close()
    raise typer.Exit(0 if all(replayed.equal for replayed in found) else 1)


def public_key(given: str) -> str:
    """A public key as it is, or as a file holds it."""
    path = Path(given)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else given
    if not re.fullmatch(r"[0-9a-f]{64}", text.strip()):
        raise LedgerError(f"--key {given}: neither 64 hexadecimal digits nor a file with them")
    return text.strip()
