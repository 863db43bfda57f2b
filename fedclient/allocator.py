"""How the C library gives memory back, on devices that have little of it.

glibc raises the size from which it maps memory of its own with every large block that is freed, up to
32 MiB. Activations are smaller, so they end up in a heap that fills with holes: how high it grows
depends on the order of what threads free (mallopt(3), M_MMAP_THRESHOLD). With a fixed size every
larger tensor is mapped, and given back when it is freed.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
MAPPED_FROM_BYTES = 1 << 20


def give_back_large_blocks() -> None:
    """Map every block from ``MAPPED_FROM_BYTES`` on by itself; without glibc nothing happens."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
