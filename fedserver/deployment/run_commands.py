"""``fedbraid server run``, ``follow`` and ``stop``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedserver import events

if TYPE_CHECKING:
    from fedserver.deployment.flower_control import FlowerControl, LiveRun, RunStatus
    from fedserver.deployment.folder import ServerFolder
    from fedserver.deployment.runs import LogTail

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")]
Name = Annotated[
    str | None, typer.Argument(metavar="RUN", help="Its name; not needed where one is under way.")
]
# What shows a run: a context manager that gives a listener. It is told what time it is.
MakeView = Callable[[Callable[[], float]], AbstractContextManager[events.Listener]]
DETACHED = 130  # what shells report for a process that SIGINT ended
RESUMPTIONS = 20


def add_run_commands(server: typer.Typer, make_view: MakeView) -> None:
    """Give a group of commands its ``run``, ``follow`` and ``stop``.

    ``make_view``: shows a run's events.
    """

    @server.command()
    def run(
        directory: Folder,
        scenario: Annotated[str, typer.Argument(help="A TOML file, or a scenario of fedbraid.")],
        override: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
        ] = None,
        output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder.")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Continue a run.")] = False,
    ) -> None:
        """Run a scenario on the devices that have joined, and show it until its end.

        Ctrl-C leaves it running: 'server follow' shows it again, 'server stop' ends it.
        """
        from fedserver.configuration import load
        from fedserver.deployment.flower_control import LiveRun
        from fedserver.deployment.runs import refuse_another
        from fedserver.run_folder import check_startable

        folder, control = _server(directory)
        configuration = load(scenario, override or ())
        target = (output or folder.runs / configuration.name).expanduser().resolve()
        # Before its ledger is looked at, which has another answer.
        refuse_another(folder, control, target)
        check_startable(target, configuration, resume=resume)
        file = Path(scenario).expanduser()
        settings: dict[str, str | bool] = {
            "scenario": str(file.resolve()) if file.is_file() else scenario,
            "output": str(target),
            "set": ";".join(override or ()),
            "resume": resume,
            "server-key": str(folder.sealing_key),
            "enrolment": str(folder.registry),
        }
        _accompany(folder, control, LiveRun(0, settings), make_view)

    @server.command()
    def follow(directory: Folder, name: Name = None) -> None:
        """Show a run that is under way until its end; Ctrl-C leaves it running."""
        folder, control = _server(directory)
        _accompany(folder, control, _chosen(control, name), make_view)

    @server.command("stop")
    def stop_run(directory: Folder, name: Name = None) -> None:
        """End a run at once, in order; 'run --resume' goes on after its last committed round."""
        from fedserver.deployment import runs

        folder, control = _server(directory)
        live = _chosen(control, name)
        print(f"stopping {live.name}", flush=True)
        runs.stop(folder, control, live)
        far = runs.how_far(live.folder)
        print(f"stopped {far}; {runs.resumption(folder, live)} goes on")


def _server(directory: Path) -> tuple[ServerFolder, FlowerControl]:
    """A server that is up. Raises DeploymentError, FolderError."""
    from fedhost.supervision import status_of
    from fedserver.deployment.flower_control import DeploymentError, FlowerControl
    from fedserver.deployment.folder import open_folder

    folder = open_folder(directory)
    control = FlowerControl(folder.ports().superlink, folder.loopback_identity.authority)
    if status_of(folder.path) is None:
        raise DeploymentError(f"the server is down: 'fedbraid server up {directory}' starts it")
    return folder, control


def _chosen(control: FlowerControl, name: str | None) -> LiveRun:
    from fedserver.deployment.flower_control import DeploymentError

    live = control.live_runs()
    found = [one for one in live if name in (None, one.name)]
    names = ", ".join(one.name for one in live)
    if not found:
        there_are = f"; there are {names}" if live else ""
        raise DeploymentError(f"no run {f'{name!r} ' if name else ''}is under way{there_are}")
    if len(found) > 1:
        raise DeploymentError(f"say which run: {names}")
    return found[0]


def _accompany(
    folder: ServerFolder, control: FlowerControl, live: LiveRun, make_view: MakeView
) -> None:
    """Start a run (one without an id) and show it, or show one that is under way.

    Raises DeploymentError unless it comes to its end.
    """
    from fedserver.deployment.flower_control import DeploymentError
    from fedserver.deployment.runs import LogTail, short, told
    from fedserver.metrics import finished, nothing_learnt

    known = told(live.folder)
    under_way = live.run_id and known.get("state") == "running"
    tail = LogTail(live.folder, known.get("run_offset") if under_way else None)
    try:
        with make_view(tail.now) as view:
            status = _until_its_end(folder, control, live, tail, view)
            summary = _summary(folder, live, status)
            view(finished(summary))
    except KeyboardInterrupt:
        of = f"{short(folder.path)} {live.name}"
        print(
            f"\nthe run goes on: 'fedbraid server follow {of}' shows it again,"
            f" 'fedbraid server stop {of}' ends it",
            file=sys.stderr,
        )
        raise typer.Exit(DETACHED) from None
    print(f"finished: ledger head {summary['head']}")
    if failure := nothing_learnt(summary, live.folder):
        raise DeploymentError(failure)


def _until_its_end(
    folder: ServerFolder,
    control: FlowerControl,
    live: LiveRun,
    tail: LogTail,
    view: events.Listener,
) -> RunStatus:
    """Show a run, and start it anew where its process was killed."""
    from dataclasses import replace

    from fedserver.configuration import load
    from fedserver.deployment import runs
    from fedserver.deployment.application import bundle
    from fedserver.deployment.flower_control import DeploymentError

    awaited = runs.Awaited(load(live.scenario, live.overrides), folder.registry, control)
    for number in range(1 + RESUMPTIONS):
        if not live.run_id:
            # Whoever else shows the run starts it anew as well: one of them does.
            live = runs.start(folder, control, live, bundle(), join=number > 0)
            print(f"run {live.name} {_beginning(live)}: {live.folder}", flush=True)
        try:
            status = runs.follow(
                folder, control, live.run_id, tail, awaited, view, remind=sys.stdout.isatty()
            )
        except DeploymentError as error:
            raise runs.lost(folder, live, error) from None
        killed = status.outcome == "failed" and not status.explained
        if not killed or runs.has_no_room(folder.path):
            break
        # Its process was killed, perhaps with its SuperExec: the ledger knows how far it was.
        resumes = (live.folder / "ledger.db").exists()
        live = replace(live, run_id=0, settings={**live.settings, "resume": resumes})
    return status


def _beginning(live: LiveRun) -> str:
    from fedserver.ledger import Ledger

    if not live.settings["resume"] or not (live.folder / "ledger.db").is_file():
        return "has started"
    ledger = Ledger(live.folder)
    try:
        last = ledger.last("round")
    finally:
        ledger.close()
    return f"resumes from round {last.round + 1 if last else 1}"


def _summary(folder: ServerFolder, live: LiveRun, status: RunStatus) -> dict[str, Any]:
    """The summary of a run that came to its end. Raises DeploymentError for every other."""
    from fedserver.deployment import runs
    from fedserver.deployment.flower_control import DeploymentError

    known, go_on = runs.told(live.folder), runs.resumption(folder, live)
    far = runs.how_far(live.folder)
    # A process that Flower ended said nothing; what is there may be of one before it.
    completed = status.outcome == "completed"
    if status.outcome == "stopped" or (completed and known.get("state") == "stopped"):
        raise DeploymentError(f"{known.get('reason') or 'stopped'} {far}; {go_on} goes on")
    if completed:
        found: dict[str, Any] = json.loads((live.folder / "summary.json").read_text())
        return found
    if runs.has_no_room(folder.path):
        raise DeploymentError(f"the disk of {folder.path} is full: make room, then {go_on}")
    log = folder.path / "logs" / "superexec.log"
    raise DeploymentError(
        f"the run failed {far}: {status.reason or f'see {log}'}; when that is mended, {go_on} goes on"
    )
