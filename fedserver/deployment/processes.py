"""The processes of a deployed server, and the entry point that supervises them.

    python -m fedserver.deployment.processes DIR

SuperLink, SuperExec and gatekeeper listen on loopback only; nginx is the only one that may do otherwise.
With process isolation and a database a run survives the death of its SuperLink.
"""

from __future__ import annotations

import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

from fedhost.flower import environment
from fedhost.ports import LOOPBACK, accepts, holder
from fedhost.probes import answers_grpc, answers_http, answers_https
from fedhost.supervision import Child, SupervisionError, Supervisor, status_of
from fedserver.deployment.certificates import CertificateError, check_given
from fedserver.deployment.dashboard import require_people
from fedserver.deployment.folder import FolderError, Ports, ServerFolder, Settings, open_folder
from fedserver.deployment.front_door import FrontDoor, FrontDoorError, is_healthy

ERRORS = (CertificateError, FolderError, FrontDoorError, SupervisionError)


def children(folder: ServerFolder, settings: Settings, ports: Ports) -> list[Child]:
    """The server's processes, in the order in which they need each other.

    Raises FrontDoorError where nginx cannot be run.
    """
    own = environment(folder.flower)
    loopback, shown = folder.loopback_identity, folder.identity(settings)
    door = FrontDoor(
        host=settings.host,
        port=settings.port,
        identity=shown,
        superlink_port=ports.superlink,
        superlink_authority=loopback.authority,
        gatekeeper_port=ports.gatekeeper,
        dashboard=settings.dashboard,
        dashboard_port=ports.dashboard,
        body_megabytes=settings.body_megabytes,
    )
    superlink = [
        sys.executable, "-m", "fedserver.deployment.superlink",
        "--host", LOOPBACK,
        "--port", str(ports.superlink),
        "--isolation", "process",
        "--database", str(folder.flower / "superlink.db"),
        "--enable-supernode-auth",
        "--superexec-auth-secret-file", str(folder.superexec_secret),
        "--ssl-certfile", str(loopback.certificate),
        "--ssl-keyfile", str(loopback.key),
        "--ssl-ca-certfile", str(loopback.authority),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    superexec = [
        sys.executable, "-m", "fedhost.superexec",
        "--runtime-api-address", f"{LOOPBACK}:{ports.superlink}",
        "--root-certificates", str(loopback.authority),
        "--superexec-auth-secret-file", str(folder.superexec_secret),
        "--health-server-address", f"{LOOPBACK}:{ports.superexec_health}",
    ]  # fmt: skip
    gatekeeper = [sys.executable, "-m", "fedserver.deployment.service", str(folder.path)]
    dashboard = [sys.executable, "-m", "fedserver.deployment.dashboard", str(folder.path)]
    shows = [Child("dashboard", dashboard, own, lambda: answers_http(ports.dashboard))]
    return [
        Child("superlink", superlink, own, lambda: answers_https(ports.superlink)),
        Child(
            "superexec", superexec, own, lambda: answers_grpc(ports.superexec_health)
        ),
        Child("gatekeeper", gatekeeper, own, lambda: answers_http(ports.gatekeeper)),
        *(shows if settings.dashboard else []),
        Child(
            "nginx", door.write(folder.path / "nginx"), own,
            lambda: is_healthy(settings.host, settings.port),
        ),
    ]  # fmt: skip


def check_startable(folder: ServerFolder, settings: Settings) -> None:
    """Find out before anything starts why it would not. Raises one of ERRORS."""
    told = status_of(folder.path)
    if told is not None:
        raise SupervisionError(f"{folder.path} is already running (process {told['pid']})")
    if settings.certificate:
        check_given(folder.identity(settings), datetime.now(UTC))
    _check_free(settings.listen, "--listen")
    if settings.dashboard:
        require_people(folder, settings)
        _check_free(settings.dashboard, "--dashboard")


def _check_free(listen: str, option: str) -> None:
    host, _, digits = listen.rpartition(":")
    host, port = host.strip("[]"), int(digits)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise FolderError(
                f"port {port} is for root: choose one above 1023 with {option}"
            ) from None
        except OSError as error:
            if accepts(port, host):
                raise FolderError(
                    f"port {port} is taken by {holder(port)}: end that, or choose another one with"
                    f" {option}"
                ) from None
            raise FolderError(f"cannot listen on {listen}: {error.strerror}") from None


def supervise(path: Path) -> None:
    """Run the server in the foreground until it is told to stop. Raises one of ERRORS."""
    folder = open_folder(path)
    settings = folder.settings()
    check_startable(folder, settings)
    Supervisor(folder.path, children(folder, settings, folder.choose_ports())).run()


if __name__ == "__main__":
    try:
        supervise(Path(sys.argv[1]))
    except ERRORS as error:
        sys.exit(f"error: {error}")
