"""The processes of a joined device, and the entry point that supervises them.

python -m fedclient.deployment.processes FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedclient.deployment.settings import SHUT_OUT, NodeFolder, NodeFolderError, open_folder
from fedclient.node import Refused
from fedclient.resident.connection import Connection
from fedclient.resident.flower import node_environment
from fedclient.resident.settings import SettingsError
from fedhost.ports import LOOPBACK, free_ports
from fedhost.probes import PROBE_SECONDS, answers_grpc, answers_http
from fedhost.supervision import Child, SupervisionError, Supervisor


def children(folder: NodeFolder, runtime_port: int, health_port: int) -> list[Child]:
    """Resident worker, SuperNode, SuperExec; each is restarted by itself.

    Raises SettingsError for limits of the worker that cannot work.
    """
    own = node_environment(folder.path)
    resident = folder.resident()
    resident.check()
    supernode = [
        sys.executable, "-m", "fedclient.deployment.supernode", str(folder.path), str(runtime_port),
    ]  # fmt: skip
    superexec = [
        sys.executable, "-m", "fedhost.superexec",
        "--insecure",
        "--runtime-api-address", f"{LOOPBACK}:{runtime_port}",
        "--superexec-auth-secret-file", str(folder.superexec_secret),
        "--health-server-address", f"{LOOPBACK}:{health_port}",
    ]  # fmt: skip
    return [
        Child("worker", resident.command(), own, lambda: _answers(resident.socket)),
        Child(
            "supernode", supernode, own, lambda: answers_http(runtime_port),
            finish={SHUT_OUT: "the server has shut this node out: ask for a new token, then"
                    " 'fedbraid client leave' and 'join'"},
        ),
        Child(
            "superexec", superexec, own, lambda: answers_grpc(health_port)
        ),
    ]  # fmt: skip


def _answers(path: Path) -> bool:
    try:
        with Connection(path, patience=PROBE_SECONDS) as connection:
            connection.health()
    except Refused:
        return False
    return True


def supervise(path: Path) -> None:
    """Run the node in the foreground until it is told to stop.

    Raises NodeFolderError, SettingsError or SupervisionError.
    """
    folder = open_folder(path)
    folder.read()
    Supervisor(folder.path, children(folder, *free_ports(2))).run()


if __name__ == "__main__":
    try:
        supervise(Path(sys.argv[1]))
    except (NodeFolderError, SettingsError, SupervisionError) as error:
        sys.exit(f"error: {error}")
