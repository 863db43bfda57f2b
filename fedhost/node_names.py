"""What a node may be called: the same in a scenario, in an invitation and in a certificate."""

from __future__ import annotations

import re

NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$"
NAME_LENGTH = 64


def is_node_name(text: str) -> bool:
    """Whether a scenario could name a node so."""
    # Python's $ is also before a newline at the end.
    return re.fullmatch(NAME.rstrip("$"), text) is not None and len(text) <= NAME_LENGTH
