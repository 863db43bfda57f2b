"""Where benchmarks print their tables."""

from __future__ import annotations

import sys

from rich.console import Console

WIDE = 200
"""Columns where no terminal says how many there are: rich would take 80, and cut what is wider."""


def table_console() -> Console:
    """Standard output; as wide as the terminal, or as any table in a pipe or a file."""
    return Console(width=None if sys.stdout.isatty() else WIDE)
