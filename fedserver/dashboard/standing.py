"""What operators' recorded actions have made of a run: who is kept out, and where it went back."""

from __future__ import annotations

from fedserver.control import EXCLUDING
from fedserver.dashboard.run_reader import RunReader


def standings(run: RunReader) -> dict[str, str]:
    """Nodes that an operator's recorded action keeps out, and how."""
    found: dict[str, str] = {}
    for entry in run.operator_entries():
        action = entry["content"].get("action")
        node = str((entry["content"].get("arguments") or {}).get("node"))
        if action in EXCLUDING:
            found[node] = EXCLUDING[action]
        elif action == "readmit":
            found.pop(node, None)
    return found


def rollbacks(run: RunReader) -> list[list[int]]:
    """Pairs of a round and the earlier one from whose model it started instead of its predecessor's."""
    return [
        [entry["round"], int(entry["content"]["arguments"]["round"])]
        for entry in run.operator_entries()
        if entry["content"].get("action") == "rollback"
    ]
