"""``fedbraid dashboard`` and ``fedbraid accounts``."""

from __future__ import annotations

import asyncio
import socket
import sys
import webbrowser
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from fedserver.dashboard import memory
from fedserver.dashboard.accounts import LOOPBACK, ROLES, VIEWER, AccountError, Accounts
from fedserver.dashboard.oidc import Provider, read_settings

PORT = 8265
Root = Annotated[Path, typer.Argument(help="A run folder, or a folder of many.")]
accounts_app = typer.Typer(help="Who may open a dashboard, and who may act.", no_args_is_help=True)


class DashboardError(Exception):
    """The dashboard cannot be served as asked; the message says what to do."""


def dashboard(
    folder: Root = Path("runs"),
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = PORT,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need TLS and accounts.")
    ] = "127.0.0.1",
    certificate: Annotated[
        Path | None, typer.Option(help="TLS certificate chain, PEM.", exists=True, dir_okay=False)
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Its private key, PEM.", exists=True, dir_okay=False)
    ] = None,
    alerts: Annotated[
        str,
        typer.Option(metavar="URL", help="POST alerts there as JSON: loss, quorum, silence ..."),
    ] = "",
    oidc: Annotated[
        Path | None,
        typer.Option(help="TOML file of an OpenID provider to sign in by.", dir_okay=False),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
) -> None:
    """Serve the runs of a folder: live status, every round, and actions for operators."""
    accounts = Accounts(folder)
    provider = Provider(*read_settings(oidc)) if oidc is not None else None
    check_binding(folder, host, certificate, key, accounts, provider)
    if alerts and not alerts.startswith(("http://", "https://")):
        raise DashboardError(f"{alerts} is no http or https address to send alerts to")
    serve(
        folder,
        accounts,
        host=host,
        port=port,
        certificate=certificate,
        key=key,
        alerts=alerts,
        show=open_browser,
        provider=provider,
    )


@accounts_app.command()
def add(
    folder: Root,
    name: Annotated[str, typer.Argument(help="Whom to let in.")],
    role: Annotated[str, typer.Option(help=" or ".join(ROLES))] = VIEWER,
) -> None:
    """Make an account, or set its password and role anew, which ends its sessions.

    Asks for the password, or reads a pipe.
    """
    if sys.stdin.isatty():
        password = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    else:
        password = sys.stdin.readline().rstrip("\n")
    accounts = _existing(folder)
    first = not accounts.names()
    accounts.add(name, role, password)
    print(f"{name} may sign in as {role}")
    if first:
        print(
            "the link that a dashboard's terminal shows has ended, and who came by it is signed out"
        )


@accounts_app.command("list")
def list_accounts(folder: Root) -> None:
    """Names and roles."""
    for name, role in _existing(folder).names():
        print(f"{name}\t{role}")


@accounts_app.command()
def remove(folder: Root, name: str) -> None:
    """Delete an account, its tokens and its sessions, in a dashboard that runs as well."""
    _existing(folder).remove(name)
    print(f"{name} may no longer sign in, and is signed out")


@accounts_app.command()
def token(
    folder: Root,
    name: Annotated[str, typer.Argument(help="What the program is called in the ledger.")],
    role: Annotated[str, typer.Option(help=" or ".join(ROLES))] = VIEWER,
) -> None:
    """Print a bearer token for a program, such as Prometheus; it is shown once."""
    print(_existing(folder).issue_token(name, role))


@accounts_app.command()
def tokens(folder: Root) -> None:
    """Bearer tokens: id, name, role, when made and last used (UTC); the token itself is kept nowhere."""
    for one in _existing(folder).tokens():
        print(one.id, one.name, one.role, _moment(one.issued), _moment(one.used), sep="\t")


@accounts_app.command()
def revoke(
    folder: Root,
    token: Annotated[str, typer.Argument(help="Its id, as accounts tokens lists it.")],
    reason: Annotated[str, typer.Option(help="Stands in the record.")] = "",
) -> None:
    """End a bearer token, in a dashboard that runs as well."""
    ended = _existing(folder).revoke_token(token, reason=reason)
    print(f"token {ended.id} of {ended.name} ({ended.role}) is revoked")


def check_binding(
    folder: Path,
    host: str,
    certificate: Path | None,
    key: Path | None,
    accounts: Accounts,
    provider: Provider | None = None,
) -> None:
    """Refuse what would show runs to a network unprotected.

    Raises:
        DashboardError: no such folder, half a key pair, or not loopback without TLS and an account.
    """
    if not folder.is_dir():
        raise DashboardError(f"{folder} is no folder; give a run folder, or a folder of runs")
    if (certificate is None) != (key is None):
        raise DashboardError("TLS needs both --certificate and --key")
    if is_loopback(host):
        return
    if certificate is None:
        raise DashboardError(
            f"{host} is not loopback: give --certificate and --key, or reach 127.0.0.1 through ssh -L"
        )
    if not accounts.names() and provider is None:
        raise DashboardError(
            f"{host} is not loopback: make an account first with fedbraid accounts add {folder} NAME"
            " --role operator, or name an OpenID provider with --oidc"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    folder: Path,
    accounts: Accounts,
    *,
    host: str,
    port: int,
    certificate: Path | None = None,
    key: Path | None = None,
    alerts: str = "",
    show: bool = False,
    provider: Provider | None = None,
) -> None:
    """Serve until stopped. Without accounts or provider the terminal shows a link that works once."""
    import uvicorn

    from fedserver.dashboard.alerts import Watchdog
    from fedserver.dashboard.application import make_application

    tls = certificate is not None
    hosts = None if tls else (*LOOPBACK, host)
    application = make_application(folder, accounts, hosts=hosts, provider=provider)
    if alerts:
        Watchdog(application.state.site.library, alerts).start()
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"{'https' if tls else 'http'}://{shown}:{listening.getsockname()[1]}/"
    if not accounts.names() and provider is None:
        address += f"login?invitation={accounts.invite()}"
    memory.give_back_large_blocks()
    memory.collect_seldom()
    print(f"dashboard of {folder}: {address}", flush=True)
    if show:
        webbrowser.open(address)
    configuration = uvicorn.Config(
        application,
        log_level="warning",
        ssl_certfile=certificate,
        ssl_keyfile=key,
        server_header=False,
        # Streams of viewers do not end by themselves.
        timeout_graceful_shutdown=1,
    )

    async def answer() -> None:
        memory.limit_threads()
        await uvicorn.Server(configuration).serve(sockets=[listening])

    asyncio.run(answer())


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        # Who follows the link before the application is up waits instead of being refused.
        found.listen(1024)
    except OSError as error:
        raise DashboardError(
            f"{host}:{port} cannot be used: {error.strerror}; choose another --port"
        ) from None
    return found


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _existing(folder: Path) -> Accounts:
    if not folder.is_dir():
        raise AccountError(f"{folder} is no folder; give the folder that the dashboard serves")
    return Accounts(folder)
