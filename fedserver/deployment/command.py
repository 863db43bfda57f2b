"""``fedbraid server``: up, invite, revoke, status, down."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fedserver.deployment.flower_control import LiveRun
    from fedserver.deployment.folder import ServerFolder

server_app = typer.Typer(help="Run a server that devices join.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
REFUSED = "devices refuse the certificate that the server shows"


@server_app.command()
def up(
    directory: Folder,
    listen: Annotated[
        str | None, typer.Option(metavar="ADDRESS:PORT", help="Where devices connect.")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="A name or address of this server in its certificate."),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="A certificate chain (PEM) instead of one made here.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="The key of --certificate.")] = None,
    authority: Annotated[
        Path | None, typer.Option(help="The authority of --certificate, for devices to pin.")
    ] = None,
    dashboard: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS:PORT",
            help="Where people with an account see the dashboard; '' for nowhere.",
        ),
    ] = None,
    oidc: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="TOML file of an OpenID provider by which people sign in to it; '' for none.",
        ),
    ] = None,
    alerts: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where it posts alerts as JSON; '' for nowhere."),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, for systemd or a container.")
    ] = False,
) -> None:
    """Start the server: SuperLink, SuperExec, enrolment and nginx; settings are remembered."""
    from fedhost.supervision import start_detached
    from fedserver.deployment.certificates import CertificateError
    from fedserver.deployment.folder import open_folder
    from fedserver.deployment.front_door import is_healthy, is_refused
    from fedserver.deployment.processes import check_startable, supervise

    changes: dict[str, Any] = {"listen": listen, "names": tuple(name) if name else None}
    changes |= {"dashboard": dashboard, "alerts": alerts}
    changes["oidc"] = str(Path(oidc).expanduser().resolve()) if oidc else oidc
    given = {"certificate": certificate, "key": key, "authority": authority}
    changes |= {k: str(v.expanduser().resolve()) for k, v in given.items() if v is not None}
    folder = open_folder(directory)
    settings = folder.prepare({k: v for k, v in changes.items() if v is not None})
    check_startable(folder, settings)
    if foreground:
        supervise(folder.path)
        return
    command = [sys.executable, "-m", "fedserver.deployment.processes", str(folder.path)]
    start_detached(command, folder.path, lambda: is_healthy(settings.host, settings.port))
    if is_refused(settings.host, settings.port, folder.identity(settings).authority):
        raise CertificateError(f"the server runs, but {REFUSED}: give another, or see to the clock")
    print(f"https://{settings.address} serves; folder {folder.path}")
    if settings.dashboard:
        print(f"{settings.dashboard_address} shows the dashboard")


@server_app.command()
def invite(
    directory: Folder,
    name: Annotated[str, typer.Argument(help="The node's name, as in the scenario.")],
    hours: Annotated[float, typer.Option(help="How long the token is valid.")] = 24.0,
    as_json: Json = False,
) -> None:
    """Print a token with which one device may join, once."""
    from fedserver.deployment.folder import open_folder
    from fedserver.deployment.invitation import invite as make

    made = make(open_folder(directory), name, hours)
    if as_json:
        print(json.dumps({"url": made.url, "token": made.token, "name": name, "hours": hours}))
    else:
        print(made.command)


@server_app.command()
def revoke(directory: Folder, name: Annotated[str, typer.Argument(help="A node's name.")]) -> None:
    """Shut a node out, at once: its next request is refused. An unused invitation becomes void."""
    from fedserver.deployment.flower_control import DeploymentError, FlowerControl
    from fedserver.deployment.folder import FolderError, open_folder

    folder = open_folder(directory)
    registry = _registry(folder.registry)
    try:
        if not registry.revoke(name, time.time()):
            raise FolderError(f"no node and no invitation is called {name!r}")
        try:
            FlowerControl(folder.ports().superlink, folder.loopback_identity.authority).follow(
                registry
            )
            later = ""
        except (DeploymentError, FolderError):
            later = "; Flower is told when the server comes up"
    finally:
        registry.close()
    print(f"{name} is revoked{later}")


@server_app.command()
def status(directory: Folder, as_json: Json = False) -> None:
    """Processes, runs, nodes and open invitations; exit code 1 when something is not ready."""
    from fedhost.supervision import status_of
    from fedserver.deployment.folder import open_folder
    from fedserver.deployment.front_door import is_refused
    from fedserver.deployment.runs import how_far

    folder = open_folder(directory)
    settings = folder.settings()
    live = _live_runs(folder)
    told = status_of(folder.path)
    registry = _registry(folder.registry)
    nodes, invitations = registry.nodes(), registry.open_invitations(time.time())
    registry.close()
    processes: dict[str, Any] = told["children"] if told else {}
    ready = bool(processes) and all(one["state"] == "ready" for one in processes.values())
    # Processes that are well do not help where devices refuse what the front door shows them.
    refused = ready and is_refused(
        settings.host, settings.port, folder.identity(settings).authority
    )
    ready = ready and not refused
    if as_json:
        print(
            json.dumps(
                {
                    "url": f"https://{settings.address}",
                    "ready": ready,
                    "processes": {
                        n: {k: p[k] for k in ("pid", "state", "restarts", "last_exit")}
                        for n, p in processes.items()
                    },
                    "nodes": [
                        {"name": n.name, "joined": n.joined, "revoked": n.revoked} for n in nodes
                    ],
                    "invitations": invitations,
                    "runs": [one.name for one in live],
                }
            )
        )
    else:
        console = Console(soft_wrap=True)
        if told is None:
            console.print(f"not running: 'fedbraid server up {directory}' starts it")
        else:
            console.print(f"https://{settings.address}: {'ready' if ready else 'not ready'}")
        if refused:
            console.print(f"{REFUSED}: 'server down', then 'up'")
        table = Table("process", "state", "restarts", "process id", box=box.SIMPLE_HEAD)
        for label, one in processes.items():
            table.add_row(label, one["state"], str(one["restarts"]), str(one["pid"] or ""))
        people = Table("node", "since", "", box=box.SIMPLE_HEAD)
        for node in nodes:
            people.add_row(node.name, _day(node.joined), "revoked" if node.revoked else "joined")
        for label, expires in invitations.items():
            people.add_row(label, "", f"invited until {_day(expires)}")
        if told is not None:
            console.print(table)
        for one in live:
            console.print(f"run {one.name} is under way, {how_far(one.folder)}", highlight=False)
        console.print(people)
    raise typer.Exit(0 if ready else 1)


@server_app.command()
def down(
    directory: Folder,
    force: Annotated[
        bool, typer.Option("--force", help="Also while a run is under way; it can be resumed.")
    ] = False,
) -> None:
    """Stop the server's processes."""
    from fedhost.supervision import stop
    from fedserver.deployment.flower_control import DeploymentError
    from fedserver.deployment.folder import open_folder
    from fedserver.deployment.runs import resumption

    folder = open_folder(directory)
    folder.settings()
    live = _live_runs(folder)
    if live and not force:
        names = ", ".join(one.name for one in live)
        raise DeploymentError(
            f"{names} is under way: 'fedbraid server stop {directory}' ends it first, --force cuts it"
            " off; either way 'server run … --resume' goes on"
        )
    print("stopped" if stop(folder.path) else "was not running")
    for one in live:
        print(
            f"run {one.name} was cut off; when the server is up, {resumption(folder, one)} goes on"
        )


def _live_runs(folder: ServerFolder) -> list[LiveRun]:
    """The runs under way; none where the server is down, or does not answer."""
    from fedhost.supervision import status_of
    from fedserver.deployment.flower_control import DeploymentError, FlowerControl
    from fedserver.deployment.folder import FolderError

    if status_of(folder.path) is None:
        return []
    try:
        superlink = folder.ports().superlink
        return FlowerControl(superlink, folder.loopback_identity.authority).live_runs()
    except (DeploymentError, FolderError):
        return []


def _registry(path: Path) -> Any:
    from fedserver.deployment.registry import Registry

    return Registry(path)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
