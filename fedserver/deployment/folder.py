"""A deployed server's folder: its settings, keys, registry, logs and runs; closed to other users.

server.toml            what the operator chose
authority/             the authority that devices pin (ca.crt, ca.key)
certificates/          the server's certificate, for the front door and for the hop behind it
enrolment.db           invitations and nodes
ledger.pem             the key that seals the ledgers of its runs
flower/                Flower's home; superlink.db
nginx/                 the generated configuration
runs/                  run folders with their ledgers
logs/, status.json     of the supervised processes
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import tomli_w

from fedhost.ports import LOOPBACK, accepts, free_ports
from fedhost.private_files import make_private_folder, write_private
from fedserver.deployment.certificates import (
    Identity,
    make_authority,
    make_server_certificate,
)

DEFAULT_LISTEN = f"{LOOPBACK}:8443"


class FolderError(Exception):
    """What is wrong with a server's folder or settings, and what to do."""


@dataclass(frozen=True)
class Settings:
    """What the operator chose. ``names``: hosts and addresses by which devices know the server.

    ``certificate``, ``key``, ``authority``: given PEM files instead of a certificate of the server's own
    authority. ``body_megabytes``: the largest request that a node may send. ``dashboard``: where the
    front door shows the dashboard of all runs, "" for nowhere. ``oidc``: the file of the OpenID provider
    that its people sign in by; ``alerts``: where it posts what goes wrong. "" for none.
    """

    listen: str = DEFAULT_LISTEN
    names: tuple[str, ...] = ()
    certificate: str = ""
    key: str = ""
    authority: str = ""
    body_megabytes: int = 256
    dashboard: str = ""
    oidc: str = ""
    alerts: str = ""

    @property
    def host(self) -> str:
        """The address to listen on."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port to listen on."""
        return int(self.listen.rpartition(":")[2])

    @property
    def address(self) -> str:
        """Where devices find the server: ``host:port``."""
        return f"{self._name}:{self.port}"

    @property
    def dashboard_address(self) -> str:
        """Where people find the dashboard, as browsers and OpenID providers write it."""
        port = self.dashboard.rpartition(":")[2]
        return f"https://{self._name}" + ("" if port == "443" else f":{port}")

    @property
    def _name(self) -> str:
        name = self.names[0] if self.names else LOOPBACK
        return f"[{name}]" if ":" in name else name

    def check(self) -> None:
        """Raise FolderError for what cannot work, or would not be safe."""
        loopback = _is_loopback("listen", self.listen)
        if self.dashboard:
            loopback = _is_loopback("dashboard", self.dashboard) and loopback
            if self.dashboard.rpartition(":")[2] == str(self.port):
                raise FolderError(f"dashboard {self.dashboard!r}: devices connect to that port")
        receiver = urlsplit(self.alerts)
        if self.alerts and (receiver.scheme not in ("http", "https") or not receiver.netloc):
            raise FolderError(f"alerts {self.alerts!r}: write an http or https address")
        given = (self.certificate, self.key, self.authority)
        if any(given) and not all(given):
            raise FolderError("a given certificate needs its key and its authority as well")
        if not loopback and not self.names:
            # Without a name in the certificate devices could not check whom they talk to.
            raise FolderError(
                "the server is reachable from elsewhere: say with --name HOST by which name, so"
                " that the TLS certificate holds it"
            )
        for name in self.names:
            if not name or any(c.isspace() or c in "/@;{}\"'" for c in name):
                raise FolderError(f"name {name!r}: write a host name or an address")


def _is_loopback(what: str, listen: str) -> bool:
    """Whether only this machine can reach an ADDRESS:PORT. Raises FolderError where it is none."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise FolderError(f"{what} {listen!r}: write ADDRESS:PORT, e.g. {DEFAULT_LISTEN}")
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        raise FolderError(f"{what} {host!r}: write an address, e.g. 0.0.0.0") from None


@dataclass(frozen=True)
class Ports:
    """The loopback ports of the processes behind the front door."""

    superlink: int
    superexec_health: int
    gatekeeper: int
    dashboard: int


@dataclass(frozen=True)
class ServerFolder:
    """Paths and stored values of one server's folder."""

    path: Path

    @property
    def registry(self) -> Path:
        """The registry of invitations and nodes."""
        return self.path / "enrolment.db"

    @property
    def runs(self) -> Path:
        """The run folders, and the accounts of those who may look at them."""
        return self.path / "runs"

    @property
    def flower(self) -> Path:
        """Flower's home of this server."""
        return self.path / "flower"

    @property
    def superexec_secret(self) -> Path:
        """What the SuperExec proves itself by to the SuperLink."""
        return self.path / "superexec.secret"

    @property
    def sealing_key(self) -> Path:
        """The key that seals the ledgers of all runs; made by the first."""
        return self.path / "ledger.pem"

    @property
    def loopback_identity(self) -> Identity:
        """The SuperLink's certificate, always of the server's own authority."""
        made = self.path / "certificates"
        return Identity(
            made / "server.crt", made / "server.key", self.path / "authority" / "ca.crt"
        )

    def settings(self) -> Settings:
        """The stored settings. Raises FolderError if this is no server's folder."""
        try:
            text = (self.path / "server.toml").read_text()
            values = tomllib.loads(text)
            settings = Settings(**{**values, "names": tuple(values.get("names", ()))})
        except FileNotFoundError:
            raise FolderError(
                f"{self.path} is not a server's folder: 'fedbraid server up {self.path}' makes one"
            ) from None
        except (tomllib.TOMLDecodeError, TypeError, PermissionError) as error:
            raise FolderError(f"{self.path / 'server.toml'}: {error}") from None
        settings.check()
        return settings

    def prepare(self, changes: dict[str, object]) -> Settings:
        """Make what is missing and store changed settings; nothing that is there is made anew."""
        exists = (self.path / "server.toml").exists()
        settings = replace(self.settings() if exists else Settings(), **changes)  # type: ignore[arg-type]
        settings.check()
        if not settings.dashboard and (changes.get("oidc") or changes.get("alerts")):
            raise FolderError(
                "--oidc and --alerts are the dashboard's: give --dashboard ADDRESS:PORT"
            )
        make_private_folder(self.path)
        for name in ("flower", "runs", "logs"):
            make_private_folder(self.path / name)
        authority = make_authority(self.path / "authority")
        make_server_certificate(self.path / "certificates", authority, settings.names)
        if not self.superexec_secret.exists():
            write_private(self.superexec_secret, secrets.token_bytes(32))
        write_private(self.path / "server.toml", tomli_w.dumps(asdict(settings)))
        return settings

    def identity(self, settings: Settings) -> Identity:
        """The certificate that devices see, and the authority that they pin."""
        if settings.certificate:
            return Identity(
                Path(settings.certificate), Path(settings.key), Path(settings.authority)
            )
        return self.loopback_identity

    def choose_ports(self) -> Ports:
        """The ports of last time while they are free, else others; stored for the other commands."""
        try:
            ports = self.ports()
        except FolderError:
            ports = None
        if ports is None or any(accepts(port) for port in asdict(ports).values()):
            ports = Ports(*free_ports(4))
        write_private(self.path / "ports.json", json.dumps(asdict(ports)))
        self._connect_flower(ports)
        return ports

    def ports(self) -> Ports:
        """The ports of the last start. Raises FolderError if there was none."""
        try:
            ports = Ports(**json.loads((self.path / "ports.json").read_text()))
        except FileNotFoundError:
            raise FolderError(
                f"the server has never run: 'fedbraid server up {self.path}'"
            ) from None
        except (TypeError, ValueError):  # Another version has other ports, a broken disk none.
            ports = None
        if ports is None or not all(isinstance(port, int) for port in asdict(ports).values()):
            raise FolderError(
                f"{self.path / 'ports.json'} is damaged or another version's: 'fedbraid server down"
                f" {self.path}', then 'server up {self.path}' writes it anew"
            )
        return ports

    def _connect_flower(self, ports: Ports) -> None:
        """Let Flower's own command work here: FLWR_HOME=DIR/flower flwr list."""
        connection = {
            "address": f"{LOOPBACK}:{ports.superlink}",
            "root-certificates": str(self.loopback_identity.authority),
        }
        write_private(
            self.flower / "config.toml",
            tomli_w.dumps({"superlink": {"default": "server", "server": connection}}),
        )


def open_folder(path: Path) -> ServerFolder:
    """The folder of a server, by an absolute path."""
    return ServerFolder(path.expanduser().resolve())
