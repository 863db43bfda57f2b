"""The processes of a joined device, and the entry point that supervises them.

python -m fedclient.deployment.processes FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedclient.deployment.settings import NodeFolder, NodeFolderError, open_folder
from fedclient.deployment.supernode import SHUT_OUT
from fedhost.flower import environment, program
from fedhost.ports import LOOPBACK, accepts, free_ports
from fedhost.private_files import make_private_folder
from fedhost.supervision import Child, SupervisionError, Supervisor


def children(folder: NodeFolder, runtime_port: int, health_port: int) -> list[Child]:
    """SuperNode, SuperExec. The app of a message goes on while either is restarted."""
    own = environment(folder.flower)
    supernode = [
        sys.executable, "-m", "fedclient.deployment.supernode", str(folder.path), str(runtime_port),
    ]  # fmt: skip
    superexec = [
        program("flower-superexec"),
        "--insecure",
        "--runtime-api-address", f"{LOOPBACK}:{runtime_port}",
        "--superexec-auth-secret-file", str(folder.superexec_secret),
        "--health-server-address", f"{LOOPBACK}:{health_port}",
    ]  # fmt: skip
    return [
        Child(
            "supernode", supernode, own, lambda: accepts(runtime_port),
            finish={SHUT_OUT: "the server has shut this node out: ask for a new token, then"
                    " 'fedbraid client leave' and 'join'"},
        ),
        Child(
            "superexec", superexec, own, lambda: accepts(health_port), descendants_survive=True
        ),
    ]  # fmt: skip


def supervise(path: Path) -> None:
    """Run the node in the foreground until it is told to stop.

    Raises NodeFolderError or SupervisionError.
    """
    folder = open_folder(path)
    folder.read()
    make_private_folder(folder.flower)
    Supervisor(folder.path, children(folder, *free_ports(2))).run()


if __name__ == "__main__":
    try:
        supervise(Path(sys.argv[1]))
    except (NodeFolderError, SupervisionError) as error:
        sys.exit(f"error: {error}")
