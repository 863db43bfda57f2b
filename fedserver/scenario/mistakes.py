"""What is told of a mistake in a scenario."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigurationError(Exception):
    """What is wrong with a scenario, where, and what to do. Never needs a traceback."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the nearest known word; "" where none is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
