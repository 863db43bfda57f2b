"""The ``fedbraid`` command. Heavy rooms are imported by the sub-command that needs them."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from simulations.bench_command import bench_app

# Busy-waiting OpenMP threads collapse when a machine is shared; this must precede torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# peft imports it where it is installed, and it then misses a kernel of its own that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

STOPPED, CLOSED_PIPE = 130, 141  # what shells report for a process that SIGINT, SIGPIPE ended
HOW_TO_CONTINUE = {
    "simulate": "; the same command with --resume goes on after the last committed round",
    "compare": "; the same command goes on where this one was",
}


class Commands(TyperGroup):
    """The sub-commands. Typer would end them without a word on Ctrl-C, and with 1 on a closed pipe."""

    def invoke(self, ctx: Any) -> Any:
        """Run the sub-command; raise typer.Exit where it was stopped or its reader has left."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                # What is left in the buffer would find the pipe closed where nobody catches it.
                sys.stdout.flush()
        except KeyboardInterrupt:
            how = HOW_TO_CONTINUE.get(ctx.invoked_subcommand, "")
            Console(stderr=True, soft_wrap=True).print(f"\nstopped{how}")
            raise typer.Exit(STOPPED) from None
        except BrokenPipeError:
            # The interpreter flushes once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(CLOSED_PIPE) from None
        except SystemExit as error:
            # Rich has seen the closed pipe first, and its own exit code is 1.
            if isinstance(error.__context__, BrokenPipeError):
                raise typer.Exit(CLOSED_PIPE) from None
            raise


app = typer.Typer(
    cls=Commands,
    name="fedbraid",
    help="Federated fine-tuning of language models across unlike devices. Errors are one message;"
    " add --debug to see where they come from.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
export_app = typer.Typer(help="Write a run's model for other programs.", no_args_is_help=True)
app.add_typer(export_app, name="export")
app.add_typer(bench_app, name="bench")

Scenario = Annotated[
    str, typer.Argument(help="A TOML file, or the name of a scenario that comes with fedbraid.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. nodes.cafe.lora_r=4."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run folder.")]
Folder = Annotated[Path, typer.Argument(help="A run folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
Round = Annotated[
    int | None, typer.Option("--round", min=1, help="The model after this round, not the newest.")
]
Exact = Annotated[bool, typer.Option("--exact", help="The whole carry, not the view's rank.")]

DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
}  # fmt: skip


class Stop(Exception):
    """An error for a person: one message, no traceback."""


@app.command()
def simulate(
    scenario: Scenario,
    override: Overrides = None,
    output: Output = None,
    engine: Annotated[str, typer.Option(help="local (in process) or flower (Ray).")] = "local",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    samples: Annotated[int, typer.Option(help="Sample questions to answer at the end.")] = 2,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Serve the run meanwhile, and open a browser.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a scenario on this machine and write a run folder with report and adapter."""
    from contextlib import nullcontext

    from fedclient.base_model import resolve_with_bars
    from fedserver.configuration import load
    from fedserver.metrics import nothing_learnt
    from simulations.live import LiveView
    from simulations.run import choose_folder
    from simulations.run import simulate as run

    configuration = load(scenario, override or ())
    folder = choose_folder(configuration, output, resume=resume)
    # Fetching the model draws bars of its own, so it comes before the live table.
    resolve_with_bars(configuration.base_model)
    from fedserver.dashboard.beside import served

    with served(folder) if dashboard else nullcontext():
        with LiveView(json=as_json) as view:
            summary = run(
                configuration, folder, view, engine=engine, resume=resume, samples=samples
            )
        if dashboard and sys.stdin.isatty():
            Console(stderr=True).print("the dashboard serves until Return is pressed")
            sys.stdin.readline()
    if failure := nothing_learnt(summary, folder):
        raise Stop(failure)


@app.command()
def compare(
    presets: Annotated[
        list[str],
        typer.Argument(
            metavar="PRESET[+KEY=VALUE]...",
            help="Presets, e.g. braid flora fedit, or mixed+mixing.rule=mean.",
        ),
    ],
    scenario: Annotated[
        str, typer.Option(help="The scenario that all of them run.")
    ] = "quickstart",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per preset.")] = 3,
    override: Overrides = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Run one scenario with several presets and seeds; a table with intervals and one page."""
    from simulations.compare import compare as run

    folder = output or Path("runs") / f"compare-{Path(scenario).stem}"
    run(scenario, presets, seeds, override or [], folder, as_json=as_json)


@app.command()
def validate(
    scenario: Scenario,
    override: Overrides = None,
    here: Annotated[
        bool,
        typer.Option("--here", help="Also that this machine has the base model to simulate it."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a scenario without running it."""
    from fedserver.configuration import load, to_toml

    configuration = load(scenario, override or ())
    if here:
        from fedclient.base_model import require_here

        require_here(configuration.base_model)
    if as_json:
        print(configuration.model_dump_json())
        return
    print(to_toml(configuration), end="")
    Console(stderr=True).print(
        f"[green]valid[/green]: {len(configuration.nodes)} nodes, {configuration.rounds} rounds,"
        f" preset {configuration.preset}, run id {configuration.run_id()}"
    )


@app.command()
def schema() -> None:
    """Print the JSON Schema of a scenario."""
    from fedserver.configuration import RunConfiguration

    print(json.dumps(RunConfiguration.model_json_schema(), indent=2))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look for what would go wrong on this machine: problem, data, remedy."""
    from simulations.doctor import main as diagnose

    raise typer.Exit(diagnose(as_json=as_json))


@export_app.command("peft")
def export_peft(
    folder: Folder,
    target: Annotated[Path, typer.Option("--to", help="Folder to write.")] = Path("adapter"),
    exact: Exact = False,
    number: Round = None,
) -> None:
    """A LoRA adapter with a model card that plain peft loads."""
    from fedserver.export import export_peft as write

    print(write(folder, target, _base_of(folder), exact=exact, number=number))


@export_app.command("merged")
def export_merged(
    folder: Folder,
    target: Annotated[Path, typer.Option("--to", help="Folder to write.")] = Path("merged"),
    exact: Exact = False,
    number: Round = None,
) -> None:
    """The base with the change added once: a model folder that plain transformers loads."""
    from fedserver.export import export_merged as write

    print(write(folder, target, _base_of(folder), exact=exact, number=number))


@export_app.command("report")
def export_report(folder: Folder) -> None:
    """The run's report.html anew: one file with all plots and numbers that loads nothing."""
    from simulations.report import write_report

    print(write_report(folder))


@export_app.command("tensorboard")
def export_tensorboard(
    folder: Folder,
    target: Annotated[Path, typer.Option("--to", help="Folder to write.")] = Path("tensorboard"),
) -> None:
    """Losses, bytes, replies and norms of every round as TensorBoard event files."""
    from simulations.tensorboard_export import export_tensorboard as write

    print(write(folder, target))


def _base_of(folder: Path) -> Path:
    from fedclient.base_model import resolve
    from fedserver.ledger import Ledger
    from fedserver.run_folder import recorded_configuration

    ledger = Ledger(folder)
    try:
        return resolve(recorded_configuration(ledger).base_model)
    finally:
        ledger.close()


def _mount_rooms() -> None:
    from fedclient.deployment.command import client_app
    from fedserver.backup_command import add_backup_commands
    from fedserver.dashboard.command import accounts_app, dashboard
    from fedserver.deployment.command import server_app
    from fedserver.deployment.run_commands import add_run_commands
    from fedserver.ledger_command import ledger_app
    from simulations.live import LiveView

    add_backup_commands(server_app)
    add_run_commands(server_app, lambda clock: LiveView(clock=clock))
    app.add_typer(server_app, name="server")
    app.add_typer(client_app, name="client")
    app.add_typer(ledger_app, name="ledger")
    app.command()(dashboard)
    app.add_typer(accounts_app, name="accounts")


def expected_errors() -> tuple[type[Exception], ...]:
    """Errors that are a person's to mend, of the rooms that have been imported."""
    found: list[type[Exception]] = [Stop]
    for module, name in (
        ("fedserver.configuration", "ConfigurationError"),
        ("fedserver.ledger", "LedgerError"),
        ("fedserver.dashboard.accounts", "AccountError"),
        ("fedserver.dashboard.command", "DashboardError"),
        ("fedserver.dashboard.vendor", "VendorError"),
        ("fedclient.base_model", "BaseModelError"),
        ("fedclient.data", "DataError"),
        ("simulations.run_directory", "RunDirectoryError"),
        ("simulations.tensorboard_export", "TensorBoardMissing"),
        ("fedhost.enrolment", "EnrolmentRefused"),
        ("fedhost.supervision", "SupervisionError"),
        ("fedserver.deployment.certificates", "CertificateError"),
        ("fedserver.deployment.flower_control", "DeploymentError"),
        ("fedserver.deployment.folder", "FolderError"),
        ("fedserver.deployment.front_door", "FrontDoorError"),
        ("fedclient.deployment.settings", "NodeFolderError"),
        ("fedclient.resident.settings", "SettingsError"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: errors for a person are one message on stderr and exit code 2."""
    _mount_rooms()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    try:
        return app(args=words, prog_name="fedbraid", standalone_mode=True)
    except Exception as error:
        # No space, no permission, no such place: a disk is a person's to mend, wherever it shows.
        disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
        if debug or not (disk or isinstance(error, expected_errors())):
            raise
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print("[bold red]error:[/bold red]", end=" ")
        console.print(str(error), markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
