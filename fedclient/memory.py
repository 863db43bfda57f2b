"""The peak memory of a stretch of work, as the system counts it.

On Linux the peak of resident memory is set back before the work (proc(5), clear_refs), so that it is the
work's own; elsewhere it is the process's since its start. It counts the whole process: in a simulation
all nodes share one, so what one node made and the next one uses (the base, weights rebuilt from a view)
is in the growth of the first of them alone.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

# ru_maxrss is in kilobytes, but on macOS in bytes.
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Peak:
    """Bytes: resident before the work, most at once during it, most of the accelerator's."""

    before: int
    most: int
    accelerator: int

    @property
    def grown(self) -> int:
        """By how much the work made the process larger, at most."""
        return max(0, self.most - self.before)

    def told(self) -> list[int]:
        """As it travels beside a reply: growth, peak, the accelerator's peak; bytes."""
        return [self.grown, self.most, self.accelerator]


class PeakMemory:
    """Counts from its making on; ``read`` says what the peak has been since.

    ``collect``: first free what waits for Python's garbage collection, which takes a good part of a
    second in a process that has imported much.
    """

    def __init__(self, *, collect: bool = False) -> None:
        if collect:
            gc.collect()
        with suppress(AttributeError, OSError):  # freed memory that is kept would hide a new need
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.before = _status("VmRSS") or _since_start()

    def read(self) -> Peak:
        """The peak so far."""
        accelerator = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return Peak(self.before, _status("VmHWM") or _since_start(), accelerator)


def _status(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None on systems that have none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def _since_start() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
