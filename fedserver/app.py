"""The Flower ServerApp: the coordinator behind ``flwr run`` and behind Flower's simulation engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedserver import events
from fedserver.configuration import RunConfiguration, load
from fedserver.deployment.registry import EnrolledKeys
from fedserver.exchange import Clock, Exchange, MachineClock
from fedserver.live_log import LiveLog
from fedserver.metrics import nothing_learnt
from fedserver.rounds import Coordinator
from fedserver.telemetry import traced


def make_app(
    configuration: RunConfiguration,
    folder: Path,
    *,
    emit: events.Listener,
    resume: bool = False,
    clock: Clock | None = None,
) -> ServerApp:
    """A ServerApp that runs ``configuration`` over whatever grid it is given, into ``folder``."""
    application = ServerApp()

    @application.main()
    def main(grid: Grid, context: Context) -> None:
        exchange = Exchange(grid, clock or MachineClock())
        listener = traced(LiveLog(folder, emit))
        Coordinator(configuration, exchange, folder, emit=listener, resume=resume).run()

    return application


app = ServerApp()


@app.main()
def deployed(grid: Grid, context: Context) -> None:
    """Entry point of ``flwr run``: the run configuration names the scenario and the run folder.

    Keys: ``scenario`` (name or file), ``output`` (folder), ``set`` (overrides, separated by ``;``),
    ``resume``, ``server-key`` (file of the key that seals the ledger; by default one in the run folder),
    ``enrolment`` (registry of a deployed server, whose nodes take part with their enrolled keys alone).
    """
    settings = context.run_config
    overrides: Sequence[str] = [o for o in str(settings.get("set", "")).split(";") if o.strip()]
    configuration = load(str(settings.get("scenario", "quickstart")), overrides)
    output = str(settings.get("output", "") or configuration.output_dir or "")
    folder = Path(output or Path("runs") / configuration.name).expanduser()
    sealing_key = str(settings.get("server-key", ""))
    registry = str(settings.get("enrolment", ""))
    enrolled = EnrolledKeys(Path(registry)) if registry else None
    coordinator = Coordinator(
        configuration,
        Exchange(grid, MachineClock()),
        folder,
        emit=traced(LiveLog(folder, _print_event)),
        resume=bool(settings.get("resume", False)),
        key_file=Path(sealing_key) if sealing_key else None,
        enrolled=enrolled,
        revoked=enrolled.revoked if enrolled is not None else frozenset,
    )
    summary = coordinator.run()
    print(f"finished: ledger head {summary['head']}, run folder {folder.resolve()}", flush=True)
    if failure := nothing_learnt(summary, folder):
        print(failure, flush=True)


def _print_event(event: events.Event) -> None:
    """One JSON line an event: a deployed ServerApp's output is a log."""
    import json

    if not isinstance(event, events.NodeProgress):
        print(json.dumps(events.to_json(event)), flush=True)
