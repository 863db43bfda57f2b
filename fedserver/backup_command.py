"""``fedbraid server backup`` and ``restore``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_backup_commands(server: typer.Typer) -> None:
    """Give a group of commands its ``backup`` and ``restore``."""
    server.command("backup")(backup)
    server.command("restore")(restore)


def backup(
    folder: Annotated[Path, typer.Argument(help="A run folder; the run may go on meanwhile.")],
    target: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")],
    keys: Annotated[
        bool,
        typer.Option("--keys", help="With the private keys in the folder; keep the file safe."),
    ] = False,
) -> None:
    """Write a run folder, as it is now, to one file."""
    from fedserver.backup import back_up

    made = back_up(folder, target, keys=keys)
    print(f"{target}: {made.entries} entries, {made.blobs} blobs, head {made.head}")


def restore(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="What 'server backup' wrote.")],
    folder: Annotated[Path, typer.Argument(help="A new run folder.")],
    key: Annotated[
        str | None, typer.Option(help="The server's public key, hexadecimal or its file.")
    ] = None,
) -> None:
    """Make a run folder from a backup; nothing is written unless all of it is sound."""
    from fedserver.backup import restore as run
    from fedserver.ledger_command import public_key

    made = run(source, folder, key=public_key(key) if key else None)
    print(f"{folder}: {made.entries} entries, {made.blobs} blobs, head {made.head}")
    if not made.keys:
        print("it has no private key: to go on with the run, give the server the key that seals it")
