"""The dashboard of one run as a process beside it: a run's memory and its lock are its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedserver.dashboard.program import command_line


@contextmanager
def served(folder: Path) -> Iterator[None]:
    """Serve ``folder`` on a free loopback port, show its address on stderr and in a browser."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command_line("dashboard", str(folder), "--port", "0", "--open"),
        stdin=subprocess.DEVNULL,
        # The run's own output may be read by a program.
        stdout=sys.stderr,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()
