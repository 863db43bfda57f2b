"""How this project starts Flower's programs: quiet, offline, each with a home of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",  # seconds; Flower's own is 1
    "PYTHONUNBUFFERED": "1",
}


def program(name: str) -> str:
    """A program of this Python environment, e.g. ``flower-superlink``."""
    return str(Path(sys.executable).parent / name)


def environment(home: Path) -> dict[str, str]:
    """The environment of a Flower process with ``home`` as its FLWR_HOME.

    Flower starts its programs by name, so this environment's folder comes first on the path.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **SETTINGS, "FLWR_HOME": str(home), "PATH": path}
