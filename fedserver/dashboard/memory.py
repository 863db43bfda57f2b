"""What keeps the dashboard's memory near what its pages hold, after rounds of ten thousand nodes."""

from __future__ import annotations

import ctypes
import gc

from anyio import to_thread

THREADS = 8
"""Handlers at work at once. Pages are processor time under one lock; each thread keeps an arena."""
LARGE_BLOCK = 1 << 17
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def give_back_large_blocks() -> None:
    """Blocks from 128 KiB on go back to the system when they are freed.

    glibc raises that size each time such a block is freed, and keeps later ones: a round's text of
    10 MB, read once, is then held by every thread that read one (mallopt(3)). Other C libraries are
    left alone.
    """
    try:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE_BLOCK)
    except (AttributeError, OSError, TypeError):
        return


def collect_seldom() -> None:
    """A round of ten thousand nodes is as many small objects, and none of them is garbage."""
    gc.set_threshold(50_000, 20, 100)


def limit_threads() -> None:
    """Of the event loop that this is called in."""
    to_thread.current_default_thread_limiter().total_tokens = THREADS
