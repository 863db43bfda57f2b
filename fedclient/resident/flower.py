"""The environment of a device's SuperNode: a home of its own, no telemetry, short polls, a lean stub."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

STUB = Path(__file__).resolve().with_name("lean_clientapp.py")
HOME, PROGRAMS = "flower", "bin"
# Flower's SuperExec looks for tasks this often, by default once a second.
TASK_POLL_SECONDS = 0.25


def node_environment(folder: Path) -> dict[str, str]:
    """What a SuperNode and its SuperExec are started with; makes what it names under ``folder``."""
    home = folder / HOME
    home.mkdir(parents=True, exist_ok=True)
    programs = install_stub(folder / PROGRAMS)
    path = [str(programs), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return {
        **os.environ,
        "PATH": os.pathsep.join(path),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(TASK_POLL_SECONDS),
        "GRPC_VERBOSITY": "ERROR",
    }


def install_stub(folder: Path) -> Path:
    """Put a ``flwr-clientapp`` into a folder, which is then to stand first on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "flwr-clientapp"
    part = program.with_suffix(f".{os.getpid()}.part")
    words = shlex.join([sys.executable, "-P", str(STUB)])
    part.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    part.chmod(0o755)
    part.replace(program)
    return folder
