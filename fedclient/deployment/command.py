"""``fedbraid client``: join, run, status, stop, leave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

client_app = typer.Typer(help="Take part with this device.", no_args_is_help=True)

Folder = Annotated[
    Path, typer.Option("--folder", metavar="DIR", help="This device's folder: settings and keys.")
]
FOLDER = Path("~/.local/share/fedbraid/node")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@client_app.command()
def join(
    url: Annotated[str, typer.Argument(help="The server, https://HOST:PORT.")],
    token: Annotated[str, typer.Option(help="What 'fedbraid server invite' printed.")],
    folder: Folder = FOLDER,
    data: Annotated[
        Path | None, typer.Option(help="This device's data (JSON lines); it stays here.")
    ] = None,
    partition: Annotated[
        int | None,
        typer.Option(min=0, help="Instead: the part of the scenario's data to play the owner of."),
    ] = None,
    systemd: Annotated[
        bool, typer.Option("--systemd", help="Install a user unit that keeps the node running.")
    ] = False,
) -> None:
    """Join a server: make keys, pin its authority and app, write one configuration file."""
    from fedclient.deployment.joining import join as enrol
    from fedclient.deployment.settings import NodeFolderError, open_folder
    from fedclient.deployment.systemd import install

    if (data is None) == (partition is None):
        raise NodeFolderError(
            "say what this device trains on: --data FILE, its own data, or --partition N, which plays"
            " the owner of part N of the scenario's data (from 0)"
            + ("; not both" if data is not None else "")
        )
    own: dict[str, Any] = {}
    if data is not None:
        own["data"] = str(data.expanduser().resolve())
        if not Path(own["data"]).exists():
            raise NodeFolderError(f"data {data}: there is no such file")
    if partition is not None:
        own["partition-id"] = partition
    opened = open_folder(folder)
    joined = enrol(url, token, opened, own)
    print(f"joined {joined.server} as {joined.name}; configuration {opened.file}")
    if systemd:
        print(install(opened, joined.name))


@client_app.command()
def run(
    folder: Folder = FOLDER,
    background: Annotated[
        bool, typer.Option("--background", help="Return once the node is connected.")
    ] = False,
) -> None:
    """Take part: keep this device's SuperNode running until Ctrl-C, 'stop', or revocation."""
    from fedclient.deployment.processes import supervise
    from fedclient.deployment.settings import open_folder
    from fedhost.supervision import start_detached

    opened = open_folder(folder)
    joined = opened.read()
    if not background:
        supervise(opened.path)
        return
    command = [sys.executable, "-m", "fedclient.deployment.processes", str(opened.path)]
    start_detached(command, opened.path, lambda: True)
    print(f"{joined.name} takes part; 'fedbraid client stop' ends it")


@client_app.command()
def status(folder: Folder = FOLDER, as_json: Json = False) -> None:
    """This device's processes, and what the server says; exit code 1 when it cannot take part."""
    from fedclient.deployment.joining import inquire
    from fedclient.deployment.settings import open_folder
    from fedclient.resident.server_clock import CLOSE_SECONDS, ServerClock
    from fedhost.enrolment import EnrolmentRefused
    from fedhost.supervision import status_of

    opened = open_folder(folder)
    joined = opened.read()
    told = status_of(opened.path)
    states = {name: one["state"] for name, one in told["children"].items()} if told else {}
    kind, verdict, clock = "accepted", "accepts this node", ServerClock()
    try:
        if inquire(opened, clock).application != joined.application:
            kind = "other-application"
            verdict = "runs another app than this device pinned: join anew to trust it"
    except EnrolmentRefused as refusal:
        kind, verdict = refusal.kind, f"says: {refusal}"
    if as_json:
        print(
            json.dumps(
                {"name": joined.name, "server": joined.server, "verdict": kind, "processes": states}
            )
        )
    else:
        processes = ", ".join(f"{name} {state}" for name, state in states.items())
        print(f"{joined.name}: {processes or 'not running'}")
        print(f"{joined.server} {verdict}")
        if abs(ahead := clock.device_is_ahead) > CLOSE_SECONDS:
            print(f"this device's clock is {ahead:+.0f} s from the server's, which counts: set it")
    well = bool(states) and all(state == "ready" for state in states.values())
    raise typer.Exit(0 if well and kind == "accepted" else 1)


@client_app.command("stop")
def stop_node(folder: Folder = FOLDER) -> None:
    """Stop this device's processes; it stays enrolled."""
    from fedclient.deployment.settings import open_folder
    from fedhost.supervision import stop

    opened = open_folder(folder)
    opened.read()
    print("stopped" if stop(opened.path) else "was not running")


@client_app.command("leave")
def leave_server(folder: Folder = FOLDER) -> None:
    """Stop, sign out at the server, and delete this device's keys and settings."""
    from fedclient.deployment.joining import leave
    from fedclient.deployment.settings import open_folder
    from fedclient.deployment.systemd import remove
    from fedhost.supervision import stop

    opened = open_folder(folder)
    joined = opened.read()
    stop(opened.path)
    left = leave(opened)
    remove(joined.name)
    print(f"{joined.name} has left {joined.server}")
    if left:
        print(f"{opened.path} stays, for it holds what is not the program's: {', '.join(left)}")
