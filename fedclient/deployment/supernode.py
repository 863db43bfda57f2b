"""Flower's SuperNode, made to run one app bundle only: the one that this device pinned when it joined.

    python -m fedclient.deployment.supernode FOLDER RUNTIME_PORT

Whoever commands a SuperLink can send any code to its nodes. Flower can check bundles for signatures of
its hub alone, so the same check is given another rule here: the bundle's SHA-256. A bundle that fails it
is answered with Flower's own error for unverified bundles, and is never unpacked.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.supercore.fab import Fab
from flwr.supernode import start_client_internal

from fedclient.deployment.joining import inquire
from fedclient.deployment.settings import SHUT_OUT, NodeFolder, open_folder
from fedclient.resident.server_clock import ServerClock
from fedclient.resident.supernode import mend, run
from fedhost.enrolment import EnrolmentRefused
from fedhost.ports import LOOPBACK


def pin(application: str) -> None:
    """Let this process's SuperNode take the bundle with this SHA-256 (hex) and no other."""
    pull = start_client_internal._pull_and_store_message

    def pull_pinned(**given: Any) -> int | None:
        fetch: Callable[[str, int], Fab] = given["get_fab"]

        def marked(fab_hash: str, run_id: int) -> Fab:
            fab = fetch(fab_hash, run_id)
            # Flower asks for this word before it asks the rule below.
            return Fab(fab.hash_str, fab.content, {"valid_license": "pinned"})

        return pull(**given | {"get_fab": marked, "trusted_entities": {"sha256": application}})

    def is_pinned(fab: Fab, trusted_entities: dict[str, str]) -> bool:
        return hashlib.sha256(fab.content).hexdigest() == trusted_entities["sha256"]

    start_client_internal._pull_and_store_message = pull_pinned  # type: ignore[assignment]
    start_client_internal._verify_fab = is_pinned


def arguments(folder: NodeFolder, runtime_port: int) -> list[str]:
    """The SuperNode's command line."""
    joined = folder.read()
    own = {
        "name": joined.name,
        "key": str(folder.update_key_file),
        "worker": str(folder.resident().socket),
        **joined.node,
    }
    return [
        "--superlink", joined.server,
        "--root-certificates", str(folder.authority),
        "--auth-supernode-private-key", str(folder.transport_key_file),
        "--isolation", "process",
        "--superexec-auth-secret-file", str(folder.superexec_secret),
        "--host", LOOPBACK,
        "--port", str(runtime_port),
        "--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in own.items()),
    ]  # fmt: skip


def main(path: Path, runtime_port: int) -> None:
    """Run the SuperNode unless the server has shut this node out; then the exit code is SHUT_OUT."""
    folder, clock = open_folder(path), ServerClock()
    try:
        inquire(folder, clock)
    except EnrolmentRefused as refusal:
        print(refusal, file=sys.stderr, flush=True)
        if refusal.kind in ("revoked", "unknown-node"):
            sys.exit(SHUT_OUT)
        # A server that is away is tried again with a growing pause.
        sys.exit(1)
    pin(folder.read().application)
    mend(clock)
    sys.argv = ["flower-supernode", *arguments(folder, runtime_port)]
    run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
