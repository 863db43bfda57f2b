"""Flower's SuperExec, which also takes away the processes that it started once they have ended.

    python -m fedhost.superexec ARGUMENTS

Flower's own starts a process for every message and every run and waits for none of them: each stays in
the system's table as a zombie until the SuperExec starts the next or ends.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

from flwr.supercore.superexec.executor import subprocess_executor


def start(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
    """Start a process that is waited for."""
    process = subprocess.Popen(*arguments, **settings)
    threading.Thread(target=process.wait, daemon=True).start()
    return process


def mend() -> None:
    """Mend this process's SuperExec, before it is started."""
    vars(subprocess_executor)["subprocess"] = SimpleNamespace(
        Popen=start, DEVNULL=subprocess.DEVNULL
    )


if __name__ == "__main__":
    from flwr.supercore.cli import flower_superexec

    mend()
    sys.argv[0] = "flower-superexec"
    flower_superexec()
