"""A real dashboard as a process of its own, for benchmarks and for what looks at it with a browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def dashboard_process(
    root: Path, cores: Collection[int] = ()
) -> Iterator[tuple[str, psutil.Process]]:
    """Serve ``root`` on a free loopback port: the link that signs in once, and the process.

    ``cores``: the processors that it may use, all where none is named.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "simulations.command", "dashboard", str(root), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http\S+", process.stdout.readline())
        assert found is not None
        yield found.group(0), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
