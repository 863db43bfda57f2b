"""``fedbraid server``: up, invite, revoke, run, status, down."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

server_app = typer.Typer(help="Run a server that devices join.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
POLL_SECONDS = 1.0
REFUSED = "devices refuse the certificate that the server shows"
RESUMPTIONS = 20


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
    changes["dashboard"] = dashboard
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
        print(f"https://{settings.dashboard} shows the dashboard")


@server_app.command()
def invite(
    directory: Folder,
    name: Annotated[str, typer.Argument(help="The node's name, as in the scenario.")],
    hours: Annotated[float, typer.Option(min=0.0, help="How long the token is valid.")] = 24.0,
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
    from fedserver.deployment.flower_control import ControlError, FlowerControl
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
        except (ControlError, FolderError):
            later = "; Flower is told when the server comes up"
    finally:
        registry.close()
    print(f"{name} is revoked{later}")


@server_app.command()
def run(
    directory: Folder,
    scenario: Annotated[str, typer.Argument(help="A TOML file, or a scenario of fedbraid.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run.")] = False,
) -> None:
    """Run a scenario on the devices that have joined, and wait for its end."""
    from fedhost.supervision import status_of
    from fedserver.configuration import load
    from fedserver.deployment.application import bundle
    from fedserver.deployment.flower_control import ControlError, FlowerControl, Unreachable
    from fedserver.deployment.folder import open_folder
    from fedserver.metrics import nothing_learnt

    folder = open_folder(directory)
    configuration = load(scenario, override or ())
    target = (output or folder.runs / configuration.name).expanduser().resolve()
    file = Path(scenario).expanduser()
    control = FlowerControl(folder.ports().superlink, folder.loopback_identity.authority)
    settings: dict[str, str | bool] = {
        "scenario": str(file.resolve()) if file.is_file() else scenario,
        "output": str(target),
        "set": ";".join(override or ()),
        "resume": resume,
        "server-key": str(folder.sealing_key),
        "enrolment": str(folder.registry),
    }
    for attempt in range(1 + RESUMPTIONS):
        run_id = control.start_run(bundle(), settings)
        print(f"run {run_id} has {'been resumed' if attempt else 'started'}: {target}", flush=True)
        status = None
        while status is None or not status.finished:
            time.sleep(POLL_SECONDS)
            try:
                status = control.run_status(run_id)
            except Unreachable:
                # A SuperLink that died is started again, and the run goes on meanwhile.
                if status_of(folder.path) is None:
                    raise
        if status.outcome == "completed":
            break
        if status.outcome != "failed" or status.explained or attempt == RESUMPTIONS:
            raise ControlError(
                f"run {run_id} {status.outcome or 'failed'}: {status.details or 'no details'};"
                f" see {folder.path / 'logs' / 'superexec.log'}"
            )
        # Its process was killed, perhaps with its SuperExec: the ledger knows how far it was.
        settings["resume"] = (target / "ledger.db").exists()
    summary = json.loads((target / "summary.json").read_text())
    print(f"finished: ledger head {summary['head']}")
    if failure := nothing_learnt(summary, target):
        raise ControlError(failure)


@server_app.command()
def status(directory: Folder, as_json: Json = False) -> None:
    """Processes, nodes and open invitations; exit code 1 when something is not ready."""
    from fedhost.supervision import status_of
    from fedserver.deployment.folder import open_folder
    from fedserver.deployment.front_door import is_refused

    folder = open_folder(directory)
    settings = folder.settings()
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
                }
            )
        )
    else:
        console = Console()
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
        console.print(table, people)
    raise typer.Exit(0 if ready else 1)


@server_app.command()
def down(directory: Folder) -> None:
    """Stop the server's processes."""
    from fedhost.supervision import stop
    from fedserver.deployment.folder import open_folder

    folder = open_folder(directory)
    folder.settings()
    print("stopped" if stop(folder.path) else "was not running")


def _registry(path: Path) -> Any:
    from fedserver.deployment.registry import Registry

    return Registry(path)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
