"""How a resident worker is run: its folder, its limits, and when it pauses."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

SOCKET = "worker.sock"
# A Unix socket's path has this many bytes at most, on Linux with its final zero.
LONGEST_SOCKET_PATH = 107
NICE = 10


class SettingsError(Exception):
    """What is wrong with a resident worker's settings, and what to do."""


@dataclass(frozen=True)
class ResidentSettings:
    """``folder`` (mode 0700) holds the socket and the last replies.

    ``memory_bytes``: private memory that the model's process may take (RLIMIT_DATA; memory-mapped files
    do not count). ``cpus``: cores that it may run on; the number of threads is the plan's, for it
    decides bits. ``nice``: its priority, 19 the lowest. ``pause_command``: no work while this shell
    command exits with 0.
    """

    folder: Path
    memory_bytes: int | None = None
    cpus: int | None = None
    nice: int = NICE
    pause_on_battery: bool = False
    pause_command: str | None = None

    @property
    def socket(self) -> Path:
        """The Unix socket; its path goes into the SuperNode's configuration as ``worker``."""
        return self.folder / SOCKET

    def check(self) -> None:
        """Raise SettingsError for what cannot work."""
        if len(os.fsencode(self.socket)) > LONGEST_SOCKET_PATH:
            raise SettingsError(
                f"{self.socket}: the path of a Unix socket has at most {LONGEST_SOCKET_PATH}"
                " bytes; choose a shorter folder"
            )
        if self.memory_bytes is not None and self.memory_bytes < 1 << 28:
            raise SettingsError("memory: the model's process needs at least 256 MB")
        if self.cpus is not None and self.cpus < 1:
            raise SettingsError("cpus: at least one")
        if not 0 <= self.nice <= 19:
            raise SettingsError("nice: from 0 to 19")

    def command(self) -> list[str]:
        """The command line that runs this worker in the foreground, for a supervisor or a unit."""
        words = [sys.executable, "-m", "fedclient.resident", "--folder", str(self.folder)]
        if self.memory_bytes is not None:
            words += ["--memory-mb", str(self.memory_bytes >> 20)]
        if self.cpus is not None:
            words += ["--cpus", str(self.cpus)]
        words += ["--nice", str(self.nice)]
        if self.pause_on_battery:
            words += ["--pause-on-battery"]
        if self.pause_command is not None:
            words += ["--pause-command", self.pause_command]
        return words
