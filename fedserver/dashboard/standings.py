"""What operators' recorded actions have made of a run: who is kept out, and where it went back."""

from __future__ import annotations

from typing import Any

from fedserver.control import stand
from fedserver.dashboard.activity import WAITING
from fedserver.dashboard.run_reader import RunReader


def standings(run: RunReader) -> dict[str, str]:
    """Nodes that an operator's recorded action keeps out, and how."""
    found: dict[str, str] = {}
    for entry in run.operator_entries():
        node = (entry["content"].get("arguments") or {}).get("node")
        if node is not None:
            stand(found, str(entry["content"].get("action")), str(node))
    return found


def arrivals(run: RunReader) -> list[dict[str, Any]]:
    """The nodes of the current round; one that is kept out does not wait, for nobody asks it."""
    out = standings(run)
    return [
        node | {"status": out.get(name, WAITING)} if node["status"] == WAITING else node
        for name, node in run.activity().nodes.items()
    ]


def counts(nodes: list[dict[str, Any]]) -> dict[str, int]:
    """Nodes by status: waiting, working, kept out, or the verdict of their reply."""
    found: dict[str, int] = {}
    for node in nodes:
        found[node["status"]] = found.get(node["status"], 0) + 1
    return found


def rollbacks(run: RunReader) -> list[list[int]]:
    """Pairs of a round and the earlier one from whose model it started instead of its predecessor's."""
    return [
        [entry["round"], int(entry["content"]["arguments"]["round"])]
        for entry in run.operator_entries()
        if entry["content"].get("action") == "rollback"
    ]
