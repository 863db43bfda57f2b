"""Hosts on one machine: network namespaces that end with their processes, disks of a fixed size.

Needs Linux and root; nothing is left behind, however the benchmark ends, for no namespace has a name.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000


def live_apart() -> None:
    """Give this process a network and mounts of its own. Raises PermissionError without root."""
    libc = ctypes.CDLL("libc.so.6", use_errno=True)
    if libc.unshare(CLONE_NEWNET | CLONE_NEWNS) != 0:
        raise PermissionError(f"network namespaces: {os.strerror(ctypes.get_errno())}; run as root")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


class Host:
    """A network namespace that is held by a process."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "--", "sleep", "infinity"])
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self.pid}/ns/net") == own:
            time.sleep(0.01)
        subprocess.run(self.command("ip", "link", "set", "lo", "up"), check=True)

    @property
    def pid(self) -> int:
        """The process that holds the namespace."""
        return self._holder.pid

    def command(self, *words: str) -> list[str]:
        """A command line that runs on this host."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *words]

    def close(self) -> None:
        """Let the namespace go once nothing runs in it."""
        self._holder.kill()
        self._holder.wait()


class Disk:
    """A file system of so many bytes, in memory, mounted at a folder."""

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder)]
        subprocess.run(words, check=True)
        self._folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave no byte free."""
        with self._ballast.open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue

    def clear(self) -> None:
        """Give the space back."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "--lazy", str(self._folder)], check=True)
